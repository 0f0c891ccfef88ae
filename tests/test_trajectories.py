"""The context store, the recorder, packing and validation, on hand-made numbers."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors import TrajectorySink, ZMQCollector
from aurora_rl.collectors.codec import decode, encode
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.policies import MedusaDrafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target, tiny_trajectory, topk_form
from aurora_rl.trajectories import (
    TOPK_ENTRIES,
    ContextStore,
    Sampling,
    TrajectoryRecorder,
    acceptance_length,
    accepted_per_round,
    pack,
    pad_rows,
    validate,
)

SIZES = {"vocab_size": 32, "feature_size": 16, "hidden_size": 16}


def store_of_two() -> ContextStore:
    """Slot 1 holds the prompt 5 6 7; features are the position, hidden is ten times it."""
    store = ContextStore(2, 10, feature_size=1, hidden_size=1, dtype=torch.float32)
    store.start(1, torch.tensor([5, 6, 7]))
    store.features[1, :2, 0] = torch.tensor([0.0, 1.0])
    return store


def committed(first: int, count: int, width: int) -> tuple[Tensor, Tensor]:
    """Features and hidden rows of positions ``first`` on, with rubbish behind."""
    rows = torch.full((1, width, 1), 99.0)
    rows[0, :count, 0] = first + torch.arange(count)
    return rows, 10 * rows


# ---- store and recorder ---------------------------------------------------------------------------------------------


def test_store_appends_at_each_slots_end() -> None:
    store = store_of_two()
    store.start(0, torch.tensor([9]))
    store.append(
        torch.tensor([0, 1]),
        torch.tensor([[1, 0, 0], [2, 3, 0]]),
        torch.tensor([1, 2]),
        torch.tensor([[[0.0], [7.0], [7.0]], [[2.0], [3.0], [7.0]]]),
        torch.tensor([[[0.0], [7.0], [7.0]], [[20.0], [30.0], [7.0]]]),
    )
    assert store.lengths.tolist() == [2, 5] and store.prompt_lengths.tolist() == [1, 3]
    assert store.tokens[1, :5].tolist() == [5, 6, 7, 2, 3] and store.tokens[0, :2].tolist() == [9, 1]
    assert store.features[1, :5, 0].tolist() == [0.0, 1.0, 2.0, 3.0, 0.0]  # the last token has no row yet
    assert store.hidden[1, 2:4, 0].tolist() == [20.0, 30.0]
    assert store.occupied.tolist() == [0, 1]
    store.release(0)
    assert store.occupied.tolist() == [1] and store.lengths.tolist() == [0, 5]


def test_a_request_is_cut_into_the_documented_layout() -> None:
    store, slots = store_of_two(), torch.tensor([1])
    recorder = TrajectoryRecorder(store)
    recorder.start(1)
    # Round 1: the root is 7 at position 2; a tree in order of breadth, its fourth node invalid; 3 and then 4 accepted.
    recorder.round(
        [1], [2],
        tokens=torch.tensor([[2, 3, 8, 9, 4]]),
        parents=torch.tensor([[-1, -1, 0, 9, 1]]),
        log_probs=torch.tensor([[-1.0, -0.5, -2.0, 0.0, -0.1]]),
        valid=torch.tensor([[True, True, True, False, True]]),
        accepted=torch.tensor([[False, True, False, False, True]]),
        hidden=torch.tensor([[[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]]]),
        policy_versions=[6], cache_versions=[5],
    )  # fmt: skip
    store.append(slots, torch.tensor([[3, 4, 1]]), torch.tensor([3]), *committed(2, 3, 3))
    # Round 2: no tree, one token.
    none = torch.zeros(1, 0, dtype=torch.int64)
    recorder.round(
        [1], [5], none, none, none.float(), none.bool(), none.bool(), torch.zeros(1, 1, 1),
        policy_versions=[7], cache_versions=[7],
    )  # fmt: skip
    store.append(slots, torch.tensor([[30]]), torch.tensor([1]), *committed(5, 1, 1))
    trajectory = recorder.cut(1, request=4, sampling=Sampling(0.5, 3, 0.9, 11, "sample_and_match", "topk"))

    validate(trajectory, vocab_size=32, feature_size=1, hidden_size=1)
    flat = {".".join(k): trajectory[k].tolist() for k in trajectory.keys(True, True) if isinstance(k, tuple)}
    assert flat == {
        "sequence.tokens": [5, 6, 7, 3, 4, 1, 30],
        "sequence.prompt_length": 3,
        "sequence.features": [[0.0], [1.0], [2.0], [3.0], [4.0], [5.0]],
        "sequence.hidden": [[20.0], [30.0], [40.0], [50.0]],
        "rounds.anchor": [2, 5],
        "rounds.offset": [0, 4, 4],
        "rounds.policy_version": [6, 7],
        "rounds.cache_version": [5, 7],
        "nodes.tokens": [2, 8, 3, 4],
        "nodes.parents": [-1, 0, -1, 2],
        "nodes.log_probs": pytest.approx([-1.0, -2.0, -0.5, -0.1]),
        "nodes.accepted": [False, False, True, True],
        "nodes.hidden": [[1.0], [3.0], [2.0], [5.0]],
        "sampling.temperature": 0.5,
        "sampling.top_k": 3,
        "sampling.top_p": pytest.approx(0.9),
        "sampling.seed": 11,
        "sampling.rule": 1,
        "sampling.draft_mode": 0,
    }
    assert int(trajectory["request"]) == 4

    # Memory of its own: the slot may be used again.
    before = trajectory.clone()
    for block in (store.tokens, store.features, store.hidden):
        block.zero_()
    assert all(torch.equal(trajectory[key], before[key]) for key in before.keys(True, True))

    assert [part.tolist() for part in accepted_per_round(trajectory)] == [[2, 0], [4, 0]]
    # The first round committed 3 tokens, the second, without a tree, 1: it counts where drafts were asked for.
    assert acceptance_length(trajectory) == acceptance_length(trajectory, torch.tensor([True, False])) == (3, 1)
    assert acceptance_length(trajectory, torch.tensor([True, True])) == (4, 2)


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def likeliest(served: list[TensorDict]) -> list[TensorDict]:
    """The same with the target's four likeliest tokens."""
    head = TargetParts.of(tiny_target()).head
    return [topk_form(trajectory, head, 4) for trajectory in served]


@pytest.fixture(scope="module")
def served() -> list[TensorDict]:
    drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
    return [
        tiny_trajectory(drafter, prompt_length=p, max_new_tokens=n, request=p, shape=shape)
        for p, n, shape in ((1, 5, TreeShape(2, 3)), (6, 4, TreeShape(3)), (2, 3, TreeShape(0)))
    ]


def test_served_trajectories_are_valid(served: list[TensorDict]) -> None:
    for trajectory in served:
        validate(trajectory, **SIZES)


def test_packing_lays_requests_end_to_end(served: list[TensorDict]) -> None:
    batch = pack(served)
    assert batch["sequence", "offset"].tolist() == [0, 6, 16, 21]
    assert batch["sequence", "prompt_length"].tolist() == [1, 6, 2]
    assert batch["request"].tolist() == [1, 6, 2]
    rounds, nodes = ([len(t[key]) for t in served] for key in (("rounds", "anchor"), ("nodes", "tokens")))
    assert batch["rounds", "request_offset"].tolist() == [0, rounds[0], rounds[0] + rounds[1], sum(rounds)]
    assert batch["nodes", "request_offset"].tolist() == [0, nodes[0], nodes[0] + nodes[1], sum(nodes)]
    assert len(batch["rounds", "offset"]) == sum(rounds) + 1
    # Every entry can be cut out again.
    for i, trajectory in enumerate(served):
        first, last = batch["rounds", "request_offset"][i : i + 2].tolist()
        offset = batch["rounds", "offset"][first : last + 1]
        assert torch.equal(offset - offset[0], trajectory["rounds", "offset"])
        begin, end = batch["nodes", "request_offset"][i : i + 2].tolist()
        assert (int(offset[0]), int(offset[-1])) == (begin, end)
        assert torch.equal(batch["nodes", "hidden"][begin:end], trajectory["nodes", "hidden"])
        start = int(batch["sequence", "offset"][i]) - i
        assert torch.equal(
            batch["sequence", "features"][start : start + len(trajectory["sequence", "features"])],
            trajectory["sequence", "features"],
        )


def test_packing_the_likeliest_tokens(served: list[TensorDict], likeliest: list[TensorDict]) -> None:
    batch, states = pack(likeliest), pack(served)
    keys = set(batch.keys(True, True))
    assert keys ^ set(states.keys(True, True)) == {
        (part, name) for part in ("sequence", "nodes") for name in ("hidden", *TOPK_ENTRIES)
    }
    for part in ("sequence", "nodes"):
        for name in TOPK_ENTRIES:
            assert torch.equal(batch[part, name], torch.cat([t[part, name] for t in likeliest]))


def test_packing_takes_one_form(served: list[TensorDict], likeliest: list[TensorDict]) -> None:
    with pytest.raises(ValueError, match="one form; trajectory 0 has 'hidden', trajectory 1 has 'topk_log_probs' of 4"):
        pack([served[0], likeliest[1]])
    with pytest.raises(
        ValueError, match="trajectory 0 has 'topk_log_probs' of 4 tokens, trajectory 2 has 'hidden'. Let"
    ):
        pack([*likeliest[:2], served[2]])
    other = topk_form(served[1], TargetParts.of(tiny_target()).head, 5)
    with pytest.raises(
        ValueError, match="trajectory 0 has 'topk_log_probs' of 4 tokens, trajectory 1 has .* of 5 tokens"
    ):
        pack([likeliest[0], other])


def test_log_probs_are_packed_where_all_have_them(served: list[TensorDict]) -> None:
    bare = [t.exclude(("nodes", "log_probs")) for t in served]
    for trajectories in (bare, [bare[0], *served[1:]], [*served[:2], bare[2]]):
        batch = pack(trajectories)
        assert ("nodes", "log_probs") not in batch.keys(True)
        assert set(batch.keys(True, True)) == set(pack(served).keys(True, True)) - {("nodes", "log_probs")}
    assert ("nodes", "log_probs") in pack(served).keys(True)


def test_packing_needs_something() -> None:
    with pytest.raises(ValueError, match="at least one trajectory"):
        pack([])


def test_pad_rows() -> None:
    padded = pad_rows(torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 2, 2, 6]))
    assert padded.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [3, 4, 5, 6]]
    assert pad_rows(torch.ones(3, 2), torch.tensor([0, 1, 3])).shape == (2, 2, 2)


# ---- validation -----------------------------------------------------------------------------------------------------


def ten(value: object) -> Tensor:
    return torch.tensor(value)


# One change each to a legal trajectory of a prompt of 6 tokens and 4 new ones, and what the message must say.
CORRUPTIONS = [
    (("sequence", "tokens"), lambda t: t[None], "sequence.tokens has one dimension"),
    (("sequence", "tokens"), lambda t: t.int(), "sequence.tokens has dtype torch.int32, expected int64"),
    (("sequence", "tokens"), lambda t: t.index_fill(0, ten(3), 32), r"sequence.tokens must lie in 0..31, got \d+..32"),
    (("sequence", "tokens"), lambda t: t.index_fill(0, ten(3), -1), "sequence.tokens must lie in 0..31, got -1"),
    (("sequence", "tokens"), lambda t: t[:0], "sequence.prompt_length must lie in 1..S-1=-1, got 6"),
    (("sequence", "prompt_length"), lambda t: ten(0), "sequence.prompt_length must lie in 1..S-1=9, got 0"),
    (("sequence", "prompt_length"), lambda t: ten(10), "sequence.prompt_length must lie in 1..S-1=9, got 10"),
    (("sequence", "prompt_length"), lambda t: ten([6]), "sequence.prompt_length must lie in"),
    (("sequence", "prompt_length"), lambda t: ten(math.nan), "sequence.prompt_length has dtype torch.float32"),
    (("sequence", "features"), lambda t: t[1:], r"sequence.features must have shape \[S-1,F\] = \(9, 16\), got \(8, "),
    (("sequence", "features"), lambda t: t[:, 1:], r"sequence.features must have shape .* got \(9, 15\)"),
    (("sequence", "features"), lambda t: t.long(), "sequence.features has dtype torch.int64, expected float"),
    (("sequence", "features"), lambda t: t * math.nan, "sequence.features holds a value that is not finite"),
    (("sequence", "hidden"), lambda t: t[1:], r"sequence.hidden must have shape \[S-P,H\] = \(4, 16\), got \(3, 16\)"),
    (("sequence", "hidden"), lambda t: t + math.inf, "sequence.hidden holds a value that is not finite"),
    (("rounds", "anchor"), lambda t: t - 1, "rounds.anchor must lie in P-1..S-2, got 4.."),
    (("rounds", "anchor"), lambda t: t + 9, "rounds.anchor must lie in P-1..S-2, got 14.."),
    (("rounds", "anchor"), lambda t: t.flip(0), "rounds.anchor must rise"),
    (("rounds", "anchor"), lambda t: t.fill_(6), "rounds.anchor must rise"),
    (("rounds", "offset"), lambda t: t[1:], r"rounds.offset must have shape \[R\+1\]"),
    (("rounds", "offset"), lambda t: t + 1, "rounds.offset must rise from 0 to M="),
    (("rounds", "offset"), lambda t: t * 2, "rounds.offset must rise from 0 to M="),
    (("rounds", "offset"), lambda t: t.index_copy(0, ten([1, 2]), t[[2, 1]]), "rounds.offset must rise from 0 to M="),
    (("rounds", "offset"), lambda t: t.to(torch.uint8), "rounds.offset has dtype torch.uint8, expected int64"),
    (("rounds", "policy_version"), lambda t: t[1:], "rounds.policy_version must have shape"),
    (("rounds", "cache_version"), lambda t: t.float(), "rounds.cache_version has dtype torch.float32"),
    (("nodes", "tokens"), lambda t: t + 32, "nodes.tokens must lie in 0..31"),
    (("nodes", "tokens"), lambda t: t[1:], "nodes.parents must have shape"),
    (("nodes", "parents"), lambda t: t + 1, "nodes.parents must point to an earlier node of the same tree"),
    (("nodes", "parents"), lambda t: t - 1, "nodes.parents must point to an earlier node of the same tree"),
    (("nodes", "log_probs"), lambda t: t[1:], "nodes.log_probs must have shape"),
    (("nodes", "accepted"), lambda t: t.long(), "nodes.accepted has dtype torch.int64, expected bool"),
    (("nodes", "hidden"), lambda t: t[:, :3], r"nodes.hidden must have shape \[M,H\]"),
    (("nodes", "hidden"), lambda t: t - math.inf, "nodes.hidden holds a value that is not finite"),
    (("request",), lambda t: ten([1]), r"request must have shape \[\] = \(\), got \(1,\)"),
    (("sampling", "temperature"), lambda t: ten(math.nan), "sampling.temperature holds a value that is not finite"),
    (("sampling", "top_k"), lambda t: ten(1.0), "sampling.top_k has dtype torch.float32, expected int64"),
    (("sampling", "seed"), lambda t: ten([1]), "sampling.seed must have shape"),
    (
        ("sampling", "rule"), lambda t: ten(4),
        r"sampling.rule must index \('greedy', 'sample_and_match', 'rejection', .*\) or .*, got 4",
    ),
    (("sampling", "draft_mode"), lambda t: ten(-1), r"sampling.draft_mode must index .* got -1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("key", "change", "message"), CORRUPTIONS, ids=[f"{'.'.join(k)}-{i}" for i, (k, _, _) in enumerate(CORRUPTIONS)]
)
def test_a_corrupted_entry_is_named(served: list[TensorDict], key: tuple[str, ...], change, message: str) -> None:
    trajectory = served[1].clone()
    assert len(trajectory["rounds", "anchor"]) > 2
    trajectory[key] = change(trajectory[key])
    with pytest.raises(ValueError, match=message):
        validate(trajectory, **SIZES)


def test_missing_and_unknown_entries_are_named(served: list[TensorDict]) -> None:
    without = served[1].clone()
    del without["nodes", "accepted"]
    with pytest.raises(ValueError, match=r"missing \[\('nodes', 'accepted'\)\], unknown \[\]"):
        validate(without, **SIZES)
    more = served[1].clone()
    more["nodes", "extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \[\], unknown \[\('nodes', 'extra'\)\]"):
        validate(more, **SIZES)


def test_log_probs_may_be_unknown(served: list[TensorDict]) -> None:
    trajectory = served[1].clone()
    trajectory["nodes", "log_probs"] = trajectory["nodes", "log_probs"] * math.nan
    validate(trajectory, **SIZES)


# ---- the target's likeliest tokens in place of its hidden states ----------------------------------------------------

TOPK_CORRUPTIONS = [
    ("sequence", "topk_ids", lambda t: t.int(), "sequence.topk_ids has dtype torch.int32, expected int64"),
    ("sequence", "topk_ids", lambda t: t[:, :3], r"sequence.topk_log_probs must have shape \[S-P,K\] = \(4, 3\), got"),
    ("sequence", "topk_ids", lambda t: t[1:], r"sequence.topk_ids must have shape \[S-P,K\] = \(4, 4\), got \(3, 4\)"),
    ("sequence", "topk_ids", lambda t: t[0], r"sequence.topk_ids must have shape \[S-P,K\]"),
    ("nodes", "topk_ids", lambda t: t[:, :3], r"nodes.topk_ids must have shape \[M,K\] = \(\d+, 4\), got \(\d+, 3\)"),
    ("nodes", "topk_ids", lambda t: t + 32, r"nodes.topk_ids must lie in 0..31, got 3\d.."),
    ("sequence", "topk_ids", lambda t: t - 32, r"sequence.topk_ids must lie in 0..31, got -\d+"),
    ("sequence", "topk_ids", lambda t: t[:, [0, 1, 2, 0]], "sequence.topk_ids names a token twice in one row"),
    ("nodes", "topk_ids", lambda t: t[:, [0, 1, 2, 0]], "nodes.topk_ids names a token twice in one row"),
    ("sequence", "topk_log_probs", lambda t: t.long(), "sequence.topk_log_probs has dtype torch.int64, expected float"),
    ("nodes", "topk_log_probs", lambda t: t * math.nan, "nodes.topk_log_probs holds a value that is not finite"),
    ("nodes", "topk_log_probs", lambda t: t - math.inf, "nodes.topk_log_probs holds a value that is not finite"),
    ("sequence", "topk_log_probs", lambda t: -t, "sequence.topk_log_probs must be log-probabilities, at most 0, got"),
    # Renormalised over the four likeliest, and of another temperature.
    ("sequence", "topk_log_probs", lambda t: t.log_softmax(-1), "sequence.topk_log_probs and .* a mass of 1 in every"),
    ("nodes", "topk_log_probs", lambda t: t * 1.1, r"nodes.topk_log_probs and .* give the softmax of all tokens"),
    ("sequence", "tail_log_prob", lambda t: t[:, None], r"sequence.tail_log_prob must have shape \[S-P\] = \(4,\)"),
    ("sequence", "tail_log_prob", lambda t: t * math.nan, "sequence.tail_log_prob must be log-probabilities"),
    ("nodes", "tail_log_prob", lambda t: t + math.inf, "nodes.tail_log_prob must .* at most 0, got up to inf"),
    ("nodes", "tail_log_prob", lambda t: t - math.inf, "nodes.tail_log_prob must have a mass of 1 in every row"),
]  # fmt: skip


def test_the_topk_form_is_valid(likeliest: list[TensorDict]) -> None:
    for trajectory in likeliest:
        validate(trajectory, **SIZES)
        validate(trajectory.exclude(("nodes", "log_probs")), **SIZES)


@pytest.mark.parametrize(("part", "name", "change", "message"), TOPK_CORRUPTIONS)
def test_a_corrupted_likeliest_token_is_named(
    likeliest: list[TensorDict], part: str, name: str, change, message: str
) -> None:
    trajectory = likeliest[1].clone()
    trajectory[part, name] = change(trajectory[part, name])
    with pytest.raises(ValueError, match=message):
        validate(trajectory, **SIZES)


def test_a_tail_may_be_empty(likeliest: list[TensorDict], served: list[TensorDict]) -> None:
    trajectory = likeliest[1].clone()
    for part in ("sequence", "nodes"):
        trajectory[part, "topk_log_probs"] = trajectory[part, "topk_log_probs"].log_softmax(-1).float()
        trajectory[part, "tail_log_prob"] = torch.full_like(trajectory[part, "tail_log_prob"], -math.inf)
    validate(trajectory, **SIZES)
    every = topk_form(served[1], TargetParts.of(tiny_target()).head, 32)
    assert bool((every["sequence", "tail_log_prob"] == -math.inf).all())
    validate(every, **SIZES)


def test_no_likely_token_is_too_few(likeliest: list[TensorDict]) -> None:
    trajectory = likeliest[1].clone()
    for part in ("sequence", "nodes"):
        for name in ("topk_ids", "topk_log_probs"):
            trajectory[part, name] = trajectory[part, name][:, :0]
    with pytest.raises(ValueError, match=r"sequence.topk_ids needs at least one token a row, got shape \(4, 0\)"):
        validate(trajectory, **SIZES)


def test_one_form_in_both_groups(likeliest: list[TensorDict], served: list[TensorDict]) -> None:
    mixed = likeliest[1].clone()
    mixed["nodes", "hidden"] = served[1]["nodes", "hidden"]
    both = (
        r"one form, 'hidden' or \('topk_ids', .*\), in 'sequence' and 'nodes' alike; got \[\('nodes', 'hidden'\)\] and"
    )
    with pytest.raises(ValueError, match=both):
        validate(mixed, **SIZES)
    with pytest.raises(ValueError, match=both):
        validate(mixed.exclude(*(("nodes", name) for name in TOPK_ENTRIES)), **SIZES)
    with pytest.raises(ValueError, match=r"missing \[\('nodes', 'tail_log_prob'\)\], unknown \[\]"):
        validate(likeliest[1].exclude(("nodes", "tail_log_prob")), **SIZES)
    with pytest.raises(ValueError, match=r"missing \[\('nodes', 'hidden'\), \('sequence', 'hidden'\)\], unknown \[\]"):
        validate(served[1].exclude(("sequence", "hidden"), ("nodes", "hidden")), **SIZES)


def test_every_form_crosses_the_wire(likeliest: list[TensorDict], served: list[TensorDict]) -> None:
    handshake = Handshake(1, "config", "head", (2, 5), "", "eagle3")
    sent = [form for t in (*served, *likeliest) for form in (t, t.exclude(("nodes", "log_probs")))]
    collector = ZMQCollector("tcp://127.0.0.1:*", handshake=handshake, validate=lambda t: validate(t, **SIZES))
    with TrajectorySink(collector.address, handshake=handshake) as sink:
        for trajectory in sent:
            sink.extend(trajectory)
        received: list[TensorDict] = []
        while len(received) < len(sent) and (new := collector.poll(10.0)):
            received += new
    collector.shutdown()
    assert collector.rejected == 0 and len(received) == len(sent)
    for before, after in zip(sent, received, strict=True):
        for trajectory in (after, decode([bytes(frame) for frame in encode("trajectory", {}, before)]).tensors):
            assert set(trajectory.keys(True, True)) == set(before.keys(True, True))
            for key in before.keys(True, True):
                assert trajectory[key].dtype == before[key].dtype and torch.equal(trajectory[key], before[key])

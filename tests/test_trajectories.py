"""The constructor of trajectories, packing and validation, on hand-made numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import closing, nullcontext

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors import TrajectorySink, ZMQCollector
from aurora_rl.collectors.codec import decode, encode
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.policies import MedusaDrafter, TargetParts, TreeShape
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.testing import tiny_target, tiny_trajectory, topk_form
from aurora_rl.trajectories import (
    DRAFT_MODES,
    RULE_CODES,
    TOPK_ENTRIES,
    make_trajectory,
    pack,
    pad_rows,
    validate,
)

SIZES = {"vocab_size": 32, "feature_size": 16, "hidden_size": 16}


# ---- the constructor ------------------------------------------------------------------------------------------------


def trajectory_of(*trees: dict[str, Tensor], temperature: float = 1.0) -> TensorDict:
    """Six tokens, two of them prompt, and rounds at positions 1, 2, ..."""
    count = len(trees)
    return make_trajectory(
        request=3,
        tokens=torch.arange(6),
        prompt_length=2,
        features=torch.ones(5, 16),
        target={"hidden": torch.ones(4, 16)},
        anchors=range(1, count + 1),
        trees=trees,
        policy_versions=[7] * count,
        cache_versions=[6] * count,
        sampling_params=SamplingParams(temperature, top_k=5, seed=9),
        rule="rejection",
        draft_mode="sampled",
    )


def tree_of(nodes: int, *, scores: bool = True) -> dict[str, Tensor]:
    """A chain."""
    tree = {"tokens": torch.arange(nodes), "parents": torch.arange(nodes) - 1, "accepted": torch.ones(nodes).bool()}
    return tree | {"hidden": torch.ones(nodes, 16)} | ({"log_probs": -torch.ones(nodes)} if scores else {})


@pytest.mark.parametrize("sizes", [(), (2,), (2, 0, 3)])
def test_a_trajectory_of_any_number_of_rounds_is_valid(sizes: tuple[int, ...]) -> None:
    trajectory = trajectory_of(*map(tree_of, sizes))
    validate(trajectory, **SIZES)
    assert trajectory["rounds", "offset"].diff().tolist() == list(sizes)
    assert trajectory["nodes", "tokens"].tolist() == [token for size in sizes for token in range(size)]


def test_scores_that_a_round_lacks_are_left_out() -> None:
    trajectory = trajectory_of(tree_of(2), tree_of(1, scores=False))
    validate(trajectory, **SIZES)
    assert ("nodes", "log_probs") not in trajectory.keys(True) and len(trajectory["nodes", "tokens"]) == 3


@pytest.mark.parametrize(("temperature", "rule"), [(0.0, "greedy"), (0.5, "rejection")])
def test_a_greedy_request_is_recorded_as_greedy(temperature: float, rule: str) -> None:
    recorded = trajectory_of(temperature=temperature)["sampling"]
    assert RULE_CODES[recorded["rule"]] == rule and DRAFT_MODES[recorded["draft_mode"]] == "sampled"
    assert float(recorded["temperature"]) == temperature and int(recorded["seed"]) == 9


def test_min_p_is_recorded_where_there_is_one() -> None:
    """So that engines and recordings without it are read as ever."""
    plain, limited = (
        make_trajectory(
            request=0, tokens=torch.arange(6), prompt_length=2, features=torch.ones(5, 16),
            target={"hidden": torch.ones(4, 16)}, anchors=[], trees=[], policy_versions=[], cache_versions=[],
            sampling_params=SamplingParams(1.0, min_p=min_p, seed=9),
        )
        for min_p in (0.0, 0.125)
    )  # fmt: skip
    for trajectory, there in ((plain, False), (limited, True)):
        validate(trajectory, **SIZES)
        assert (("sampling", "min_p") in trajectory.keys(True)) is there
    assert pack([limited, plain])["sampling", "min_p"].tolist() == [0.125, 0.0]
    assert pack([plain])["sampling", "min_p"].tolist() == [0.0]
    limited["sampling", "min_p"] = torch.tensor(math.nan)
    with pytest.raises(ValueError, match="sampling.min_p holds a value that is not finite"):
        validate(limited, **SIZES)


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
    likeliest_five = topk_form(served[1], TargetParts.of(tiny_target()).head, 5)
    with pytest.raises(
        ValueError, match="trajectory 0 has 'topk_log_probs' of 4 tokens, trajectory 1 has .* of 5 tokens"
    ):
        pack([likeliest[0], likeliest_five])


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
    (("sequence", "features"), lambda t: t * 0 + 3e37, r"sequence.features has 144 values beyond 1e\+08"),
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
    (("nodes", "hidden"), lambda t: t - 2e8, r"nodes.hidden has \d+ values beyond 1e\+08"),
    (("request",), lambda t: ten([1]), r"request must have shape \[\] = \(\), got \(1,\)"),
    (("sampling", "temperature"), lambda t: ten(math.nan), "sampling.temperature holds a value that is not finite"),
    (("sampling", "top_k"), lambda t: ten(1.0), "sampling.top_k has dtype torch.float32, expected int64"),
    (("sampling", "seed"), lambda t: ten([1]), "sampling.seed must have shape"),
    (
        ("sampling", "rule"), lambda t: ten(5),
        r"sampling.rule must index \('greedy', 'sample_and_match', 'rejection', .*\) or .*, got 5",
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


def tree_with(parents: Sequence[int]) -> dict[str, Tensor]:
    nodes = len(parents)
    return {
        "tokens": torch.ones(nodes, dtype=torch.int64),
        "parents": torch.tensor(parents),
        "accepted": torch.zeros(nodes, dtype=torch.bool),
        "hidden": torch.zeros(nodes, 4),
    }


def test_trees_that_are_not_depth_first_are_refused() -> None:
    """Every tree of up to five nodes, between two others: it is refused if a subtree has a foreign node in it."""
    for count in range(1, 6):
        for parents in itertools.product(*(range(-1, node) for node in range(count))):
            trajectory = make_trajectory(
                request=0, tokens=torch.ones(6, dtype=torch.int64), prompt_length=2, features=torch.zeros(5, 4),
                target={"hidden": torch.zeros(4, 4)}, anchors=[1, 2, 3],
                trees=[tree_with([-1, 0, -1]), tree_with(parents), tree_with([-1, 0])], policy_versions=[0] * 3,
                cache_versions=[0] * 3, sampling_params=SamplingParams(),
            )  # fmt: skip
            subtrees = [{node} for node in range(count)]
            for node in reversed(range(count)):
                if parents[node] >= 0:
                    subtrees[parents[node]] |= subtrees[node]
            whole = all(max(each) - min(each) + 1 == len(each) for each in subtrees)
            with nullcontext() if whole else pytest.raises(ValueError, match="must lay every tree depth-first; order"):
                validate(trajectory, vocab_size=32, feature_size=4, hidden_size=4)


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
    with closing(TrajectorySink(collector.address, handshake=handshake)) as sink:
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

"""A drafter that is broken while it serves: found in time, named by what was compared, mended; and no false alarm."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle_server import DEPTH, VOCAB, Inbox, Serving, eagle, requests
from torch import Tensor

from aurora_rl.envs import TransformersEngine
from aurora_rl.policies import Drafter, DrafterPolicy, Eagle3Drafter, Proposal, TreeShape
from aurora_rl.policies.faults import EVERY
from aurora_rl.serving.canary import RoundTrialRules
from aurora_rl.serving.watchdog import Watchdog
from aurora_rl.testing import tiny_target

IN_TIME = 50  # rounds


def watched(folder: Path, drafter: Drafter, **options: object) -> Serving:
    """A server that has drafted for a while, in which nothing was found."""
    serving = Serving(folder, [], drafter, slots=2, watched=True, **options)
    serving.run_until(lambda: len(serving.server.stats.rounds) >= 40, KNOWN)
    assert serving.events("watchdog") == []
    return serving


KNOWN = requests(5, budget=40)


def found(serving: Serving, *, most: int = IN_TIME, faults: int = 1) -> dict:
    """The newest fault, found in time; the answers are what they should be."""
    serving.run_until(lambda: len(serving.events("watchdog")) == faults, KNOWN, most=most)
    serving.check_texts()
    return serving.events("watchdog")[-1]


def ended(serving: Serving) -> None:
    """Serve for a while, without another fault."""
    faults, rounds = len(serving.events("watchdog")), len(serving.server.stats.rounds)
    serving.run_until(lambda: len(serving.server.stats.rounds) >= rounds + 40, KNOWN)
    serving.queue.clear()
    serving.run()
    serving.check_texts()
    assert len(serving.events("watchdog")) == faults


def drafts(serving: Serving) -> bool:
    """Whether the drafter is asked in the next rounds."""
    rounds = len(serving.server.stats.rounds)
    serving.run_until(lambda: len(serving.server.stats.rounds) >= rounds + 4, KNOWN)
    return any(r.drafted for r in serving.server.stats.rounds[-4:])


NAME = "midlayer.self_attn.o_proj.weight"


def zeroed(tensor: Tensor) -> None:
    tensor.zero_()  # as after a memory resume


def transposed(tensor: Tensor) -> None:
    tensor.copy_(tensor.T.clone())


def flipped(tensor: Tensor) -> None:
    tensor[1, 2] += 1e-3


def poisoned(tensor: Tensor) -> None:
    tensor[0, :2] = torch.nan


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (zeroed, "is all zero"),
        (transposed, "is transposed"),
        (flipped, "differs from what was published in 1 of 256 values"),
        (poisoned, "has 2 values that are infinite or not a number"),
    ],
)
def test_damaged_weights_are_named_and_loaded_again(
    tmp_path: Path, damage: Callable[[Tensor], None], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    serving = watched(tmp_path, eagle())
    before = {name: tensor.clone() for name, tensor in serving.policy.drafter.published().items()}
    damage(serving.policy.drafter.published()[NAME])
    fault = found(serving)
    assert (fault["cause"], fault["detail"]) == ("corrupted", f"tensor '{NAME}' {said}")
    assert (fault["version"], fault["action"]) == (0, "its weights were loaded again")
    assert f"failed a check (corrupted): {fault['detail']}; its weights were loaded again" in caplog.text
    now = serving.policy.drafter.published()
    assert all(torch.equal(now[name], tensor) for name, tensor in before.items())
    assert drafts(serving)
    ended(serving)


def test_a_draft_vocabulary_that_changed_is_mended_too(tmp_path: Path) -> None:
    serving = watched(tmp_path, eagle())
    serving.policy.drafter.draft_vocab += 1
    fault = found(serving)
    assert fault["cause"] == "corrupted" and fault["detail"].startswith("tensor 'd2t' differs")
    assert serving.policy.drafter.draft_vocab.tolist() == list(range(6))
    ended(serving)


def test_weights_that_are_damaged_again_leave_the_drafter_out(tmp_path: Path) -> None:
    serving = watched(tmp_path, eagle())
    for faults in (1, 2):
        zeroed(serving.policy.drafter.published()[NAME])
        fault = found(serving, faults=faults)
    assert fault["action"] == "its drafts are left out until new weights come" and not drafts(serving)
    ended(serving)


def test_a_swap_that_did_nothing_is_stale_and_rolled_back(tmp_path: Path) -> None:
    inbox, drafter = Inbox(), eagle()
    serving = watched(tmp_path, drafter, receiver=inbox)
    drafter.stage = lambda weights: lambda: None  # type: ignore[method-assign]
    inbox.waiting.append((1, eagle(1).published()))
    serving.run_until(lambda: serving.server.stats.version == 1, KNOWN)
    fault = found(serving)
    assert (fault["cause"], fault["detail"]) == ("stale", "all tensors are those of version 0, not 1")
    fault = found(serving, faults=2)  # loading them again did nothing, either
    assert fault["action"] == "rolled back to version 0" and serving.server.stats.versions == [0, 1, 0]
    assert inbox.rejected == [(1, "stale: all tensors are those of version 0, not 1")]
    del drafter.stage
    assert drafts(serving)
    inbox.waiting.append((2, eagle(1).published()))  # the same again
    serving.run_until(lambda: len(inbox.rejected) == 2, KNOWN)
    inbox.waiting.append((3, eagle(2).published()))
    serving.run_until(lambda: serving.server.stats.version == 3, KNOWN)
    ended(serving)


def test_a_sync_that_transposed_a_tensor_is_mended(tmp_path: Path) -> None:
    inbox, drafter = Inbox(), eagle()
    serving = watched(tmp_path, drafter, receiver=inbox)
    stage, calls = drafter.stage, []

    def transposing(weights: dict[str, Tensor]) -> Callable[[], None]:
        calls.append(weights)
        return stage({**weights, NAME: weights[NAME].T} if len(calls) == 1 else weights)

    drafter.stage = transposing  # type: ignore[method-assign]
    inbox.waiting.append((1, eagle(1).published()))
    serving.run_until(lambda: serving.server.stats.version == 1, KNOWN)
    fault = found(serving)
    assert (fault["version"], fault["detail"]) == (1, f"tensor '{NAME}' is transposed")
    assert torch.equal(drafter.published()[NAME], eagle(1).published()[NAME])
    ended(serving)


def test_other_layers_are_a_mismatch(tmp_path: Path) -> None:
    serving = watched(tmp_path, eagle())
    serving.engine.feature_layers = (1, 0)
    fault = found(serving)
    assert fault["cause"] == "mismatched" and not drafts(serving)
    assert fault["detail"] == "it reads the layers (0, 1), and the engine hands it those of (1, 0)"
    ended(serving)


def test_rotary_tables_that_changed_are_a_mismatch(tmp_path: Path) -> None:
    serving = watched(tmp_path, eagle())
    attention = serving.policy.drafter.midlayer.self_attn
    attention._table = tuple(table[::3] for table in attention._table)
    fault = found(serving)
    assert fault["cause"] == "mismatched" and "the same text and features give other drafts" in fault["detail"]
    assert not drafts(serving)


def test_the_targets_embedding_that_changed_is_a_mismatch(tmp_path: Path) -> None:
    serving = watched(tmp_path, eagle())
    serving.policy.drafter.embedding[3] += 1.0
    fault = found(serving)
    assert fault["cause"] == "mismatched" and fault["detail"].startswith("tensor 'embedding', which is not published")


def test_a_damaged_cache_is_found_and_rebuilt(tmp_path: Path) -> None:
    serving = watched(tmp_path, eagle())
    drafter = serving.policy.drafter
    for _ in range(IN_TIME):
        if serving.events("watchdog"):
            break
        for slot in range(2):
            for row in drafter.cache_rows(slot):
                row[: int(drafter.cached[slot])] = 0.0
        serving.queue += [] if serving.queue else list(KNOWN[:2])
        serving.server.step()
    (fault,) = serving.events("watchdog")
    assert fault["cause"] == "cache" and fault["action"] == "its caches are rebuilt"
    assert "cache differs from a replay of its text from pair 0 on" in fault["detail"]
    assert drafts(serving)


def raising(*arguments: object) -> Proposal:
    raise RuntimeError("no more ideas")


def empty(slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
    nothing = torch.zeros(len(slots), 0, dtype=torch.int64)
    return Proposal(nothing, nothing, nothing.float())


@pytest.mark.parametrize(
    ("propose", "said"),
    [(raising, "it raises RuntimeError('no more ideas')"), (empty, "asked for a draft, it gives none")],
)
def test_a_dead_drafter_is_left_out_until_new_weights_come(
    tmp_path: Path, propose: Callable[..., Proposal], said: str
) -> None:
    inbox, drafter = Inbox(), eagle()
    serving = watched(tmp_path, drafter, receiver=inbox)
    drafter.propose = propose  # type: ignore[method-assign]
    fault = found(serving)
    assert fault["cause"] == "dead" and said in fault["detail"] and not drafts(serving)
    del drafter.propose
    inbox.waiting.append((1, eagle(1).published()))
    serving.run_until(lambda: serving.server.stats.version == 1, KNOWN)
    assert drafts(serving)
    ended(serving)


def test_a_version_that_kills_the_drafter_is_rolled_back(tmp_path: Path) -> None:
    inbox, drafter = Inbox(), eagle()
    serving = watched(tmp_path, drafter, receiver=inbox)
    bad = eagle(1).published()[NAME]

    class Dies(Eagle3Drafter):
        def propose(self, *arguments: object) -> Proposal:
            return raising() if torch.equal(self.published()[NAME], bad) else super().propose(*arguments)

    drafter.__class__ = Dies
    inbox.waiting.append((1, eagle(1).published()))
    serving.run_until(lambda: serving.server.stats.version == 1, KNOWN)
    fault = found(serving)
    assert (fault["cause"], fault["action"]) == ("dead", "rolled back to version 0")
    assert [version for version, _ in inbox.rejected] == [1] and drafts(serving)
    ended(serving)


def test_a_fault_ends_the_trial_of_the_weights_that_have_it(tmp_path: Path) -> None:
    inbox, second = Inbox(), eagle()
    serving = watched(tmp_path, eagle(), second_drafter=second, receiver=inbox, trial_rules=RoundTrialRules(window=8))
    inbox.waiting.append((1, eagle(1).published()))
    serving.run_until(lambda: bool(serving.events("trial")), KNOWN)
    zeroed(second.published()[NAME])
    fault = found(serving, most=2 * IN_TIME)  # it drafts half of the rounds
    assert (fault["version"], fault["cause"], fault["action"]) == (1, "corrupted", "rolled back to version 0")
    assert inbox.rejected == [(1, f"corrupted: tensor '{NAME}' is all zero")] and drafts(serving)
    ended(serving)


def test_a_request_that_the_drafter_fails_alone_is_no_fault_of_it(tmp_path: Path) -> None:
    serving = watched(tmp_path, eagle())
    failures = [2]

    class Stumbles(Eagle3Drafter):
        def propose(self, *arguments: object) -> Proposal:
            if failures[0]:
                failures[0] -= 1
                return raising()
            return super().propose(*arguments)

    serving.policy.drafter.__class__ = Stumbles
    ended(serving)
    assert serving.events("drafter_fault")


def test_a_check_without_memory_says_nothing_of_the_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = watched(tmp_path, eagle())

    def full(*arguments: object) -> Drafter:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Watchdog, "_probe", full)
    ended(serving)
    assert drafts(serving)


def test_a_slot_that_has_just_got_another_request_raises_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_rl.serving.watchdog.EVERY", 1)  # so that a check falls on each first round
    serving = Serving(tmp_path, requests(8, budget=6), eagle(), slots=2, watched=True)
    serving.run()
    serving.check_texts()
    assert len(serving.server.stats.finished) == 8 and serving.events("watchdog") == []


@pytest.mark.parametrize("rounds", [2_500, pytest.param(10_000, marks=pytest.mark.stress)])
def test_a_healthy_drafter_gives_no_alarm_through_a_domain_shift(rounds: int) -> None:
    """Texts of another kind, of which nothing is accepted, and swaps; the drafter catches up where it is checked."""
    dice, drafter = random.Random(0), eagle()
    engine = TransformersEngine(
        tiny_target(vocab_size=VOCAB), num_slots=2, max_length=256, feature_layers=drafter.feature_layers
    )
    store = engine.store
    policy = DrafterPolicy(drafter, store, num_nodes=DEPTH, shape=TreeShape(DEPTH))
    watchdog = Watchdog(policy, engine)
    kept = {0: {name: tensor.clone() for name, tensor in drafter.published().items()}}
    slots, checked, size = torch.arange(2), 0, store.features.shape[2]
    turns = rounds // EVERY
    for turn in range(turns):  # the tokens of as many rounds at once, since nothing is looked at meanwhile
        shifted, fresh = turn >= turns // 2, torch.zeros(2, dtype=torch.bool)
        lowest = VOCAB // 2 if shifted else 0
        for slot in slots.tolist():
            if not 0 < int(store.lengths[slot]) < 150:
                store.release(slot)
                store.start(slot, torch.randint(lowest, VOCAB, (8,)))
                store.features[slot, :7] = torch.randn(7, size)
                fresh[slot] = True
        accepted = [0 if shifted else dice.randrange(DEPTH + 1) for _ in range(EVERY)]
        count = EVERY + sum(accepted)
        features, hidden = (3 if shifted else 1) * torch.randn(2, count, size), torch.zeros(2, count, 16)
        policy.renew(fresh)
        store.append(slots, torch.randint(lowest, VOCAB, (2, count)), torch.full((2,), count), features, hidden)
        if turn in (turns // 4, 3 * turns // 4):
            kept[turn] = {name: tensor.clone() for name, tensor in eagle(turn).published().items()}
            policy.install(kept[turn], turn)
        policy.draft(torch.zeros(2, 1, dtype=torch.bool))
        earlier = {version: weights for version, weights in kept.items() if version < policy.version}
        for number in accepted:
            watchdog.observe(number)
            checked += 1
            assert watchdog.check(kept[policy.version], earlier, torch.zeros(2, dtype=torch.bool)) is None, turn
    assert checked == turns * EVERY > rounds - EVERY

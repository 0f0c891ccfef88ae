"""The assembler hands on a long answer in parts while the engine writes it, and nothing that may not be of its text."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_rounds import assert_same, rounds_of, sampling_of, without_first_round
from tensordict import TensorDict

from aurora_rl.envs.remote.assembler import EngineRound, TrajectoryAssembler
from aurora_rl.envs.remote.recorded_totals import RecordedTotals
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack, validate
from aurora_rl.trajectory_parts import part_of

Emitted = list[tuple[TensorDict, str | None, float]]


@pytest.fixture(scope="module")
def answer() -> TensorDict:
    """A request of 60 new tokens. Its first round accepted nothing: an engine makes that token in prefill."""
    torch.manual_seed(0)
    drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
    for request in range(200):
        found = tiny_trajectory(drafter, shape=TreeShape(3, 2, 5), max_new_tokens=60, request=request)
        delivered = found["rounds", "anchor"].diff()
        # A round in the middle delivers several tokens, for a text that stops within it.
        if int(delivered[0]) == 1 and int(delivered[5:-2].max()) > 2:
            return found
    raise AssertionError("no such trajectory")


class Engine:
    """Runs an answer's rounds past an assembler and keeps what it emits. Each pass waits for the thread."""

    def __init__(self, answer: TensorDict, part_tokens: int | None, cached: int = 0, tenant: str | None = None) -> None:
        self.emitted: Emitted = []
        self.answer, self.prompt = answer, int(answer["sequence", "prompt_length"])
        self.tokens: list[int] = answer["sequence", "tokens"].tolist()
        self.assembler = TrajectoryAssembler(
            lambda *emitted: self.emitted.append(emitted),
            max_bytes=1 << 20,
            store_bytes=1 << 20,
            part_tokens=part_tokens,
        )
        asked, begun = self.tokens[: self.prompt], (cached, 3, sampling_of(answer), tenant)
        assert self.assembler.begin("1", asked, *begun, name=str(int(answer["request"])))
        features, hidden = answer["sequence", "features"], answer["sequence", "hidden"]
        self.assembler.prompt("1", features[cached : self.prompt], {"hidden": hidden[:1]})

    def run(self, passes: Iterable[EngineRound | Sequence[EngineRound]]) -> None:
        for rounds in passes:
            self.assembler.round("1", *([rounds] if isinstance(rounds, EngineRound) else rounds))
            self.settle()

    def end(self, length: int | None = None) -> None:
        self.assembler.finish("1", self.tokens[self.prompt : length], terminated=True)
        self.assembler.close()

    def settle(self) -> None:
        done = threading.Event()
        self.assembler._store.delete = lambda tenant: done.set()  # type: ignore[method-assign]
        self.assembler._tasks.put("nobody")
        assert done.wait(10)

    @property
    def parts(self) -> list[TensorDict]:
        return [trajectory for trajectory, *_ in self.emitted]

    @property
    def written(self) -> int:
        """Length of the text of which parts were emitted."""
        return len(self.parts[-1]["sequence", "tokens"]) if self.emitted else 0


def rounds(answer: TensorDict, **changes: Any) -> list[EngineRound]:
    return [replace(each, **changes) for each in rounds_of(answer, version=3)]


def firsts(parts: Sequence[TensorDict]) -> list[int]:
    return [int(each["sequence", "prompt_length"]) for each in parts]


@pytest.mark.parametrize("part_tokens", [1, 6, 20, 1000])
def test_parts_make_up_the_request(answer: TensorDict, part_tokens: int) -> None:
    whole, engine = Engine(answer, None), Engine(answer, part_tokens, tenant="a")
    for each in (whole, engine):
        each.run(rounds(answer))
        each.end()
    (expected,), parts = whole.parts, engine.parts
    assert_same(expected.exclude("rounds"), without_first_round(answer).exclude("rounds"))
    assert len(parts) > 1 if part_tokens < 1000 else len(parts) == 1
    assert firsts(parts) == [engine.prompt, *(len(each["sequence", "tokens"]) for each in parts[:-1])]
    for part in parts:
        first, end = int(part["sequence", "prompt_length"]), len(part["sequence", "tokens"])
        assert_same(part, part_of(expected, first, end))
        validate(part, vocab_size=32, feature_size=part["sequence", "features"].shape[-1], hidden_size=16)
        assert part is parts[-1] or end - first >= max(part_tokens, first / 4)
    assert engine.written == len(engine.tokens)
    pack(parts)
    assert {tenant for _, tenant, _ in engine.emitted} == {"a"}
    assert all(0 < seconds < 60 for *_, seconds in engine.emitted)
    assert engine.assembler.counts == whole.assembler.counts == {"recorded": 1}
    assert (
        engine.assembler.totals
        == whole.assembler.totals
        == replace(RecordedTotals.of(expected), requests=1, terminated=1, prompt_tokens=engine.prompt)
    )
    assert engine.assembler._reserved == engine.assembler._released > 0


def test_a_part_comes_as_soon_as_it_is_certain(answer: TensorDict) -> None:
    engine, all_rounds = Engine(answer, 20), rounds(answer)
    passes = 0
    while not engine.emitted:
        engine.run([all_rounds[passes]])
        passes += 1
    # What came before the last pass but one is certain; that one may have ended the text.
    assert engine.written == int(all_rounds[passes - 2].anchor) + 1 >= engine.prompt + 20
    assert int(all_rounds[passes - 3].anchor) + 1 < engine.prompt + 20


def test_the_seconds_of_a_part_are_those_since_the_last_one(answer: TensorDict) -> None:
    engine = Engine(answer, 6)
    began = engine.assembler._records["1"].began
    engine.run(rounds(answer))
    record = engine.assembler._records["1"]
    engine.end()
    assert sum(seconds for *_, seconds in engine.emitted) == pytest.approx(record.ended - began)


@pytest.mark.parametrize("part_tokens", [1, 6])
def test_no_part_goes_past_a_token_that_ends_the_text(answer: TensorDict, part_tokens: int) -> None:
    """The engine starts a pass more than the request turns out to need, and the last path runs over the stop token."""
    all_rounds = rounds(answer)
    delivered = answer["rounds", "anchor"][1:].diff()
    stops = next(r for r in range(4, len(delivered)) if delivered[r] > 2)
    length = int(all_rounds[stops].anchor) + 2  # the stop token is the first accepted draft
    engine = Engine(answer, part_tokens)
    engine.run(all_rounds[: stops + 2])
    assert firsts(engine.parts) and engine.written <= int(all_rounds[stops].anchor) + 1
    engine.end(length)
    assert engine.written == length and engine.assembler.counts == {"recorded": 1}
    assert firsts(engine.parts)[1:] == [len(each["sequence", "tokens"]) for each in engine.parts[:-1]]


def test_rounds_of_one_pass_are_certain_together(answer: TensorDict) -> None:
    """A pass that is decoded plainly delivers several rounds at once, any of which may have ended the text."""
    all_rounds = rounds(answer)
    engine = Engine(answer, 1)
    engine.run([*all_rounds[:4], all_rounds[4:9]])
    assert engine.written <= int(all_rounds[3].anchor) + 1
    engine.run([all_rounds[9]])
    assert engine.written <= int(all_rounds[4].anchor) + 1
    engine.run(all_rounds[10:])
    engine.end()
    assert engine.written == len(engine.tokens)


def test_nothing_is_read_on_the_serving_path(answer: TensorDict) -> None:
    """Copies from the device arrive when somebody waits for them, which only the thread does."""
    waited: set[str] = set()

    def on_its_way(drafted: EngineRound) -> EngineRound:
        arrived = {name: getattr(drafted, name).clone() for name in ("anchor", "tokens", "path", "path_length")}
        for name, values in arrived.items():
            arrived[name] = torch.full_like(values, -99)

        def ready() -> None:
            waited.add(threading.current_thread().name)
            for name, values in arrived.items():
                values.copy_(getattr(drafted, name))

        return replace(drafted, **arrived, ready=ready)

    whole, engine = Engine(answer, None), Engine(answer, 6)
    whole.run(rounds(answer))
    engine.run(on_its_way(each) for each in rounds(answer))
    for each in (whole, engine):
        each.end()
    assert waited == {"trajectories"} and len(engine.parts) > 2
    assert torch.equal(
        torch.cat([each["nodes", "accepted"] for each in engine.parts]), whole.parts[0]["nodes", "accepted"]
    )


def test_the_thread_is_seldom_asked_for_nothing(answer: TensorDict) -> None:
    """Rounds that accept nothing deliver a token of the four that they might."""
    engine, asked = Engine(answer, 200), []
    features, hidden = answer["sequence", "features"], answer["sequence", "hidden"]
    hand_on = engine.assembler._hand_on_part

    def noted(due: Any) -> None:
        asked.append(due)
        hand_on(due)

    engine.assembler._hand_on_part = noted  # type: ignore[method-assign]
    plain = rounds(answer)[0]
    for number in range(210):
        anchor, root = torch.tensor(engine.prompt + number), torch.tensor([7])
        rows = {"features": features[:1], "target": {"hidden": hidden[:1]}}
        node = dict.fromkeys(("first_child", "next_sibling"), torch.tensor([-1]))
        path = {"path": torch.tensor([0, -1, -1, -1]), "path_length": torch.tensor(1)}
        engine.run([replace(plain, anchor=anchor, tokens=root, joint_log_probs=torch.zeros(0), **rows, **node, **path)])
    assert [len(each["sequence", "tokens"]) - engine.prompt for each in engine.parts] == [200]
    assert len(asked) < 25
    engine.assembler.drop("1", "aborted")
    engine.assembler.close()


def test_a_deletion_between_two_parts_ends_them(answer: TensorDict) -> None:
    engine, all_rounds = Engine(answer, 6, tenant="a"), rounds(answer)
    half = len(all_rounds) // 2
    engine.run(all_rounds[:half])
    before = len(engine.emitted)
    engine.assembler.delete("a")
    engine.run(all_rounds[half:])
    engine.end()
    assert len(engine.emitted) == before > 0
    assert engine.assembler.counts == {"deleted": 1} and engine.assembler.totals.requests == 0


def test_a_dropped_request_has_left_the_parts_until_then(answer: TensorDict) -> None:
    engine, all_rounds = Engine(answer, 6), rounds(answer)
    engine.run(all_rounds[: len(all_rounds) // 2])
    reached, go_on = threading.Event(), threading.Event()

    def held_up() -> None:
        reached.set()
        assert go_on.wait(10)

    for each in all_rounds[len(all_rounds) // 2 :]:
        engine.assembler.round("1", replace(each, ready=held_up))
        if reached.wait(0.2):
            break
    assert reached.is_set()  # the thread is at a part
    before = len(engine.emitted)
    engine.assembler.drop("1", "aborted")
    go_on.set()
    engine.assembler.close()
    assert len(engine.emitted) == before > 0 and engine.assembler.counts == {"aborted": 1}
    assert engine.assembler.totals.requests == 0


def test_after_a_missing_round_nothing_is_handed_on(answer: TensorDict) -> None:
    engine, all_rounds = Engine(answer, 6), rounds(answer)
    half = len(all_rounds) // 2
    engine.run(all_rounds[:half])
    before, written = len(engine.emitted), engine.written
    engine.run(all_rounds[half + 2 :])
    engine.end()
    assert written <= int(all_rounds[half].anchor) + 1
    assert len(engine.emitted) in (before, before + 1) and engine.written <= int(all_rounds[half].anchor) + 1
    assert engine.assembler.counts == {"incomplete": 1} and engine.assembler.totals.requests == 0


def test_without_its_prefix_no_part_is_handed_on(answer: TensorDict) -> None:
    engine = Engine(answer, 6, cached=3)
    engine.run(rounds(answer))
    engine.end()
    assert engine.emitted == [] and engine.assembler.counts == {"prefix": 1}


def test_a_prefix_is_looked_up_once(answer: TensorDict) -> None:
    """It may be gone from the store when the request ends."""
    engine = Engine(answer, 6, cached=3)
    features = answer["sequence", "features"][:3]
    engine.assembler._store.put(answer["sequence", "tokens"][:3], features, 2)
    engine.run(rounds(answer)[:-1])
    assert engine.emitted
    engine.assembler._store = type(engine.assembler._store)(0)
    engine.run(rounds(answer)[-1:])
    engine.end()
    assert engine.assembler.counts == {"recorded": 1} and engine.written == len(engine.tokens)
    for part in engine.parts:
        assert part["rounds", "cache_version"].unique().tolist() == [2]
        assert torch.equal(part["sequence", "features"][:3], features)


def test_what_a_fault_kept_back_comes_at_the_end(answer: TensorDict, caplog: pytest.LogCaptureFixture) -> None:
    whole, engine = Engine(answer, None), Engine(answer, 6)
    emit, faults = engine.assembler._emit, [OSError("the wire is cut")]

    def emit_or_fail(*emitted: Any) -> None:
        if faults:
            raise faults.pop()
        emit(*emitted)

    engine.assembler._emit = emit_or_fail  # type: ignore[method-assign]
    for each in (whole, engine):
        each.run(rounds(answer))
        each.end()
    assert "a part of a request could not be assembled" in caplog.text
    (expected,), (got,) = whole.parts, engine.parts
    assert_same(got, expected)
    assert engine.assembler.counts == {"recorded": 1} and engine.assembler.totals == whole.assembler.totals

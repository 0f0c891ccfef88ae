"""Canary by engine: what the draws and the test hold, and what reaches which engine over real sockets."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import wait
from tensordict import TensorDict
from torch import Tensor
from weight_ends import HANDSHAKE, LOCAL, engine

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.statistics import FigurePair, LossTest
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.training.engine_canary import EngineCanary, EngineTrial, EngineTrialRules, EngineTrialVerdict

NAMES = ["a", "b", "c", "d"]


class Fleet:
    """Engines of which each has its own traffic, hardware and drift, and which all have bursts."""

    def __init__(self, gain: float, speed: float | None, seed: int) -> None:
        self._dice, self._gain, self._speed = random.Random(seed), gain, speed
        self._level = {name: self._dice.uniform(1.5, 4.0) for name in NAMES}
        self._drift = {name: self._dice.uniform(0.99, 1.01) for name in NAMES}
        self._seconds = {name: self._dice.uniform(0.5, 2.0) for name in NAMES}

    def request(self, name: str, *, new: bool) -> dict[str, Any]:
        self._level[name] *= self._drift[name] * math.exp(self._dice.gauss(0, 0.05))
        rounds = self._dice.randint(10, 40)
        tokens = max(round(rounds * self._level[name] * (self._gain if new else 1.0)), rounds)
        seconds = rounds * self._seconds[name] * (self._dice.uniform(1, 3) if self._dice.random() < 0.1 else 1.0)
        known = None if self._speed is None else seconds / (self._speed if new else 1.0)
        return {"new": new, "tokens": tokens, "rounds": rounds, "seconds": known}


def decided(rules: EngineTrialRules, fleet: Fleet, seed: int = 0, windows: int = 1000) -> EngineTrialVerdict | None:
    trial = EngineTrial(rules, NAMES, seed)
    for _ in range(windows):
        while not trial.complete:
            for name in (*trial.new, *trial.old):
                verdict = trial.observe(**fleet.request(name, new=name in trial.new))
                if verdict is not None:
                    return verdict
                if trial.complete:
                    break
        trial.draw(NAMES)
    return None


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_equal_weights_are_rarely_rolled_back_at_engines_that_differ_and_drift(share: float) -> None:
    rules, trials = EngineTrialRules(share, requests=2, false_alarm_rate=0.1, max_requests=64), 300
    verdicts = [decided(rules, Fleet(1.0, 1.0, seed), seed) for seed in range(trials)]
    alarms = sum(not verdict.promote for verdict in verdicts if verdict is not None)
    assert None not in verdicts and alarms <= 0.1 * trials + 3 * math.sqrt(0.1 * 0.9 * trials)


def test_groups_that_are_not_drawn_again_would_exceed_the_bound() -> None:
    alarms, trials = 0, 100
    for seed in range(trials):
        fleet, test = Fleet(1.0, 1.0, seed), LossTest(["acceptance_length"], rate=0.1, margin=0.05)
        for _ in range(32):
            old, new = ([fleet.request(name, new=False) for _ in range(2)] for name in ("a", "b"))
            lengths = (sum(each["tokens"] for each in its) / sum(each["rounds"] for each in its) for its in (old, new))
            test.add({"acceptance_length": FigurePair(*lengths)})
        alarms += test.verdict is not None and not test.verdict[0]
    assert alarms > 0.3 * trials


def test_worse_weights_are_rolled_back_and_better_ones_promoted_before_the_last_request() -> None:
    rules = EngineTrialRules(0.25)
    for seed in range(10):
        worse, better = (decided(rules, Fleet(gain, gain, seed), seed) for gain in (0.4, 4.0))
        assert worse is not None and not worse.promote and worse.pairs < 32
        assert better is not None and better.promote and better.reason == "a loss above 5% is ruled out"
        assert worse.requests == 8 * worse.pairs


def test_weights_that_are_slow_are_rolled_back_though_as_much_is_accepted() -> None:
    verdict = decided(EngineTrialRules(0.5), Fleet(1.0, 0.1, seed=0))
    assert verdict is not None and not verdict.promote and verdict.reason == "tokens per second fell"


def test_engines_that_do_not_say_how_long_they_decode_are_judged_by_acceptance_alone() -> None:
    worse, better = (decided(EngineTrialRules(0.5), Fleet(gain, None, seed=0)) for gain in (0.2, 5.0))
    assert worse is not None and not worse.promote and worse.reason == "acceptance length fell"
    assert better is not None and better.promote and better.tokens_per_second is None
    assert better.acceptance_length is not None and better.acceptance_length.new > better.acceptance_length.old


def test_what_is_not_decided_is_promoted_at_last_unless_it_may_be_tried_for_ever() -> None:
    verdict = decided(EngineTrialRules(0.5, requests=2, margin=1e-9, max_requests=6), Fleet(1.0, 1.0, seed=0))
    assert verdict is not None and verdict.promote and verdict.pairs == 3
    assert verdict.reason == "no loss was proven in 6 requests per engine that had them"
    for_ever = EngineTrialRules(0.5, requests=2, margin=1e-9, false_alarm_rate=1e-6, max_requests=None)
    assert decided(for_ever, Fleet(1.0, 1.0, seed=0), windows=100) is None


def test_two_groups_of_one_size_share_the_draws_and_stay() -> None:
    sizes = {
        (share, count): len(EngineTrial(EngineTrialRules(share), [str(i) for i in range(count)]).new)
        for share in (0.01, 0.25, 0.5)
        for count in (2, 3, 9)
    }
    assert list(sizes.values()) == [1, 1, 1, 1, 1, 2, 1, 1, 4]
    trial = EngineTrial(EngineTrialRules(0.25), NAMES)
    members, draws = {*trial.new, *trial.old}, []
    for _ in range(40):
        trial.draw(NAMES)
        assert {*trial.new, *trial.old} == members and len(members) == 2
        draws.append(trial.new[0])
    assert 8 < draws.count(draws[0]) < 32
    left = trial.old[0]
    trial.draw([name for name in NAMES if name != left])
    assert left not in (*trial.new, *trial.old) and members - {left} < {*trial.new, *trial.old}


def test_engines_without_traffic_are_left_and_then_the_trial() -> None:
    trial, drawn = EngineTrial(EngineTrialRules(0.25), NAMES), set()
    while True:
        trial.observe(new=False, tokens=20, rounds=10, seconds=1.0)
        drawn.add((*trial.new, *trial.old))
        if (verdict := trial.miss(NAMES)) is not None:
            break
    assert len(drawn) == 3 and not verdict.promote and verdict.acceptance_length is None
    new, old = trial.new[0], trial.old[0]
    assert verdict.reason == (
        f"3 windows could not be compared: in the last one {new} with the new weights served 0 requests, and {old} "
        "with the former ones 1"
    )


# What reaches which engine.

RULES = EngineTrialRules(share=0.25, requests=2, false_alarm_rate=0.2, margin=0.2, max_requests=40)
OLD, NEW = ({"layer.w": torch.full((2, 3), value)} for value in (1.0, 2.0))


class Engine:
    """An engine that loads what comes. Its weights decide how many tokens its rounds deliver."""

    def __init__(self, publisher: WeightPublisher, name: str, gain: float) -> None:
        self.name, self._publisher, self._gain = name, publisher, gain
        self.receiver = engine(publisher.address, name=name)
        self.version, self.weights, self.loaded = 0, 1.0, list[int]()

    def load(self) -> bool:
        """Load what has come, and return whether that is what the engine is to have."""
        if (latest := self.receiver.latest()) is not None:
            self.version, tensors = latest
            self.weights = float(tensors["layer.w"][0, 0])
            self.receiver.acknowledge(self.version, checksum(tensors), 1.0)
            self.loaded.append(self.version)
        return self.version == self._publisher._book._wanted(self.name)

    def request(self, dice: random.Random) -> TensorDict:
        rounds = dice.randint(10, 30)
        return served(self.version, round(rounds * (3 if self.weights == 1.0 else 3 * self._gain)), rounds)


def served(version: int, tokens: int, rounds: int) -> TensorDict:
    """What a trajectory says of a request that one version has drafted."""
    return TensorDict({
        "sequence": {"tokens": torch.zeros(4 + tokens, dtype=torch.int64)},
        "rounds": {
            "anchor": 3 + torch.arange(rounds) * tokens // rounds,
            "policy_version": torch.full((rounds,), version),
        },
    }).set_non_tensor("seconds", 0.1 * rounds)  # fmt: skip


class Loop:
    """A canary over real sockets, with engines that answer a request each a turn."""

    def __init__(self, folder: Path, gain: float, names: Sequence[str]) -> None:
        self.publisher, self.folder, self.dice = WeightPublisher(LOCAL, handshake=HANDSHAKE), folder, random.Random(0)
        self.canary = EngineCanary(self.publisher, RULES, MetricsLog(folder / "metrics.jsonl", "learner"))
        self.gain, self.engines, self.most_with_new = gain, list[Engine](), 0
        for name in names:
            self.join(name)
        self.publisher.publish(1, OLD)
        wait(lambda: all([each.load() for each in self.engines]))

    def join(self, name: str) -> Engine:
        self.engines.append(Engine(self.publisher, name, self.gain))
        wait(lambda: name in self.publisher.engines)
        return self.engines[-1]

    def leave(self, name: str) -> None:
        gone = next(each for each in self.engines if each.name == name)
        self.engines.remove(gone)
        gone.receiver.close()
        wait(lambda: name not in self.publisher.engines)

    def publish_to_all(self, weights: dict[str, Tensor]) -> int:
        version = self.publisher.next_version
        self.publisher.publish(version, weights)
        return version

    def turn(self) -> None:
        """Let engines load what they are to have, and answer a request each."""
        wait(lambda: all([each.load() for each in self.engines]))
        self.most_with_new = max(self.most_with_new, sum(each.weights == 2.0 for each in self.engines))
        self.canary.follow([each.request(self.dice) for each in self.engines], self.publish_to_all)

    def end(self) -> dict[str, Any]:
        """Take turns to the end of the trial and return its event."""
        for _ in range(400):
            if not self.canary.trying:
                break
            self.turn()
        (event,) = self.events("engine_verdict")
        wait(lambda: all([each.load() for each in self.engines]))
        return event

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in MetricsReader(self.folder / "metrics.jsonl") if event["event"] == kind]

    def close(self) -> None:
        for each in self.engines:
            each.receiver.close()
        self.publisher.close()


@pytest.fixture
def loop(
    tmp_path: Path, request: pytest.FixtureRequest, quick_heartbeats: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Loop]:
    """Four engines, at which the new weights have the gain of the parameter."""
    monkeypatch.setattr("aurora_rl.collectors.engine_book._FORGET_S", 0.5)
    loop = Loop(tmp_path, request.param, NAMES)
    yield loop
    loop.close()


worse = pytest.mark.parametrize("loop", [0.4], indirect=True)
better = pytest.mark.parametrize("loop", [2.0], indirect=True)


@better
def test_better_weights_reach_one_engine_of_four_and_then_all(loop: Loop) -> None:
    version = loop.canary.begin(NEW, OLD, against=1)
    assert loop.canary.trying
    event = loop.end()
    (began,) = loop.events("engine_trial")
    assert (began["version"], began["against"], len(began["engines"]), began["of"]) == (version, 1, 1, 4)
    assert loop.most_with_new == 1
    assert event["promote"] and event["reason"] == "a loss above 20% is ruled out" and event["version"] == version
    assert event["acceptance_length"]["new"] == pytest.approx(6, abs=0.1)
    assert event["tokens_per_second"]["old"] == pytest.approx(30, abs=0.5)
    assert event["requests"] >= 2 * event["pairs"] > 4
    assert {each.version for each in loop.engines} == {event["published"]}
    assert {each.weights for each in loop.engines} == {2.0}


@worse
def test_worse_weights_are_taken_back_from_those_that_have_them(loop: Loop) -> None:
    loop.canary.begin(NEW, OLD, against=1)
    event = loop.end()
    assert not event["promote"] and loop.most_with_new == 1
    assert event["reason"] == "acceptance length and tokens per second fell"
    assert {each.weights for each in loop.engines} == {1.0}
    last = [each for each in loop.engines if each.version == event["published"]]
    assert len(last) == 1  # the other of the trial has the former weights already
    assert sum(each.loaded == [1] for each in loop.engines) == 2  # those outside of it loaded nothing

    assert loop.canary.begin(NEW, OLD, against=1) is not None  # the next one
    loop.turn()
    assert loop.most_with_new == 1


@better
def test_an_engine_that_rejects_the_new_weights_ends_the_trial(loop: Loop) -> None:
    version = loop.canary.begin(NEW, OLD, against=1)
    loop.turn()
    (has_new,) = (each for each in loop.engines if each.weights == 2.0)
    has_new.receiver.reject(version or 0, "the drafter is dead")
    wait(lambda: loop.publisher.rejected_by(version or 0))
    event = loop.end()
    assert not event["promote"]
    assert event["reason"] == f"{has_new.name} rejected version {version}: the drafter is dead"
    assert has_new.weights == 1.0 and event["acceptance_length"] is event["tokens_per_second"] is None


@better
def test_an_engine_that_goes_away_with_the_new_weights_takes_them_along(loop: Loop) -> None:
    loop.canary.begin(NEW, OLD, against=1)
    loop.turn()
    (has_new,) = (each for each in loop.engines if each.weights == 2.0)
    loop.leave(has_new.name)
    event = loop.end()
    assert not event["promote"] and event["reason"] == f"{has_new.name} went away with the new weights"
    assert {each.weights for each in loop.engines} == {1.0}


@better
def test_engines_that_join_and_leave_within_a_trial(loop: Loop) -> None:
    loop.canary.begin(NEW, OLD, against=1)
    loop.turn()
    joined = loop.join("e")
    loop.turn()
    assert joined.version == 1 and loop.canary.trying  # what is published to all
    (former,) = (each for each in loop.engines if each.version > 1 and each.weights == 1.0)
    loop.leave(former.name)
    event = loop.end()
    assert event["promote"] and loop.most_with_new == 1
    assert {each.version for each in loop.engines} == {event["published"]} and joined in loop.engines


@pytest.mark.usefixtures("quick_heartbeats")
def test_one_engine_has_no_trial(tmp_path: Path) -> None:
    loop = Loop(tmp_path, 1.0, ["a"])
    assert loop.canary.begin(NEW, OLD, against=1) is None and not loop.canary.trying
    loop.turn()
    assert not loop.events("engine_trial") and loop.engines[0].version == 1
    loop.close()


def busy(loop: Loop, requests: int) -> None:
    """Let requests arrive that were drafted by what is published to all."""
    loop.canary.follow([served(1, 60, 20) for _ in range(requests)], loop.publish_to_all)


@better
def test_a_window_waits_for_engines_that_load_slowly_and_not_for_those_without_requests(loop: Loop) -> None:
    loop.canary.begin(NEW, OLD, against=1)
    windows, trial = [loop.canary._drafted], loop.canary._trial
    busy(loop, 1000)  # nobody has loaded anything
    while trial is loop.canary._trial:
        wait(lambda: all([each.load() for each in loop.engines]) and loop.canary._have_loaded(trial))
        busy(loop, 64)  # 8 times 2 requests of each of four engines
        assert loop.canary._drafted is windows[-1]
        busy(loop, 1)
        windows.append(loop.canary._drafted)
    assert len(windows) == 4
    event = loop.end()
    assert not event["promote"] and event["reason"].startswith("3 windows could not be compared: in the last one ")
    assert {each.weights for each in loop.engines} == {1.0}


@better
def test_an_engine_that_never_loads_does_not_hold_the_learner_up(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_rl.training.engine_canary._LOADING_S", 0.0)
    loop.canary.begin(NEW, OLD, against=1)
    for _ in range(3):
        assert loop.canary.trying
        busy(loop, 70)
    assert not loop.canary.trying and not loop.events("engine_verdict")[0]["promote"]


@better
def test_a_trial_of_which_one_engine_is_left_is_rolled_back(loop: Loop) -> None:
    loop.canary.begin(NEW, OLD, against=1)
    loop.turn()
    (stays,) = (each for each in loop.engines if each.weights == 2.0)
    for each in [each for each in loop.engines if each is not stays]:
        loop.leave(each.name)
    event = loop.end()
    assert not event["promote"] and event["reason"] == "fewer than two engines are left" and stays.weights == 1.0


def test_trials_that_are_rolled_back_leave_one_copy_of_the_weights_though_engines_come_and_go(tmp_path: Path) -> None:
    publisher = WeightPublisher(LOCAL, handshake=HANDSHAKE)
    book, canary = publisher._book, EngineCanary(publisher, RULES, MetricsLog(tmp_path / "metrics.jsonl", "learner"))
    publisher.publish(1, OLD)
    copies = lambda: len({id(frames[1]) for _, frames in publisher._frames.values()})  # noqa: E731
    for number in range(12):
        names = [f"{number}-{name}" for name in NAMES]
        for name in names:
            book.note_serving(name.encode(), name, {"version": 1, "checksum": None, "received": None})
        new = {"layer.w": torch.full((2, 3), 2.0 + number)}
        version = canary.begin(new, OLD, against=1)
        assert copies() == 2 and version is not None
        book.note_nack(canary._have[0].encode(), {"version": version, "reason": "out of memory"})
        canary.follow([], lambda weights: pytest.fail("it is promoted"))
        assert not canary.trying and copies() == 1 and len(publisher._frames) <= 3  # for all, and the two of the trial
        for name in names:
            book.forget(name.encode())
    publisher.close()

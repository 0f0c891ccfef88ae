"""Canary by engine: with several engines, weights that passed the gate go to a share of them first.

A trial knows the names of engines, and counts. The wire, and the weights, are the canary's.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.statistics import FIGURES, FigurePair, LossTest, TrialSums, figure_pairs, rounded_verdict
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.trajectories import acceptance_length

# A window is missed if a group lacks requests once more than 8 times those of a window have arrived for each engine
# connected. The next is drawn from all engines: some may get no traffic.
_PATIENCE = 8
_MAX_MISSED = 3  # windows after which a trial is rolled back
_LOADING_S = 600.0  # after which arrivals count though an engine has not loaded its weights


@dataclass(frozen=True, slots=True)
class EngineTrialRules:
    """How new weights are tried at a share of the engines.

    Attributes:
        share: Share of the engines that have them meanwhile, in (0, 0.5], rounded down; at least one engine.
        requests: Requests per engine in a window, on average over its group: sums of the groups are compared. Those
            that began before the window are not counted.
        false_alarm_rate: Chance that weights as good as the former ones are ever rolled back for a loss, at most.
        margin: Relative loss that is tolerated: weights are promoted once a larger one is ruled out.
        max_requests: Requests with the new weights, per engine that has them at a time, before they are promoted if no
            loss was proven. None tries them until a loss is proven or ruled out.
        seed: Seed of the draws.
    """

    share: float = 0.125
    requests: int = 8
    false_alarm_rate: float = 0.01
    margin: float = 0.05
    max_requests: int | None = 256
    seed: int = 0


@dataclass(frozen=True, slots=True)
class EngineTrialVerdict:
    """How a trial ended.

    Attributes:
        promote: Whether all engines get the new weights.
        reason: What decided, in words.
        pairs: Windows in which the two groups were compared.
        requests: Requests with the new weights in these windows.
        acceptance_length: Tokens per round in them; None before the first.
        tokens_per_second: Tokens per second of a request, while it is decoded; None before the first window, and if an
            engine does not say it.
        evidence: Evidence of a loss, by figure; see :attr:`LossTest.evidence`.
    """

    promote: bool
    reason: str
    pairs: int
    requests: int
    acceptance_length: FigurePair | None
    tokens_per_second: FigurePair | None
    evidence: dict[str, float]


class EngineTrial:
    """Windows in which engines with the new weights are compared with as many that have the former ones.

    Before each window it is drawn which of two groups of engines gets the new weights. The other gets the former ones,
    under a new version too: what a swap costs, both pay. So engines may differ in hardware and in traffic, and drift.
    If the weights are equally good, the draw alone decides the sign of a window's difference, as
    :class:`~aurora_rl.statistics.PairedTest` needs. The engines of the two groups stay the same while they are there.

    - Rolled back: acceptance length or tokens per second is proven to be lower.
    - Promoted: of both figures a loss above the margin is ruled out; or ``max_requests`` were served.

    Args:
        rules: How weights are tried.
        engines: Names of the engines, at least two.
        seed: Added to the seed of the rules; another for each trial.

    Attributes:
        new: Engines that have the new weights in this window.
        old: As many that have the former ones.
        complete: Whether the window has its requests; :meth:`draw` begins the next.

    Example:
        >>> trial = EngineTrial(EngineTrialRules(requests=1), ["a", "b", "c"])
        >>> len(trial.new), len(trial.old)
        (1, 1)
        >>> trial.observe(new=True, tokens=10, rounds=10, seconds=1.0)
        >>> trial.observe(new=False, tokens=20, rounds=10, seconds=1.0)
        >>> trial.complete
        True
        >>> trial.end(False, "it is enough").acceptance_length
        FigurePair(old=2.0, new=1.0)
    """

    def __init__(self, rules: EngineTrialRules, engines: Sequence[str], seed: int = 0) -> None:
        self._rules, self._random = rules, random.Random(rules.seed + seed)
        self._test = LossTest(FIGURES, rules.false_alarm_rate, rules.margin)
        self._totals = TrialSums(), TrialSums()  # old weights, new weights
        self._missed = 0
        self.new: list[str] = []
        self.old: list[str] = []
        self.draw(engines)

    def draw(self, engines: Sequence[str], *, anew: bool = False) -> None:
        """Begin a window at engines of these; ``anew`` need not be those of the last one."""
        size = max(int(self._rules.share * len(engines)), 1)
        stay = [] if anew else [name for name in (*self.new, *self.old) if name in engines]
        others = [name for name in engines if name not in stay]
        self._random.shuffle(others)
        members = [*stay, *others][: 2 * size]
        self._random.shuffle(members)
        self.new, self.old = members[:size], members[size:]
        self._window = TrialSums(), TrialSums()
        self.complete = False

    def observe(self, *, new: bool, tokens: int, rounds: int, seconds: float | None) -> EngineTrialVerdict | None:
        """Take in a request of this window; return the verdict once there is one.

        Args:
            new: Whether the new weights drafted all of it; otherwise the former ones did.
            tokens: Tokens that its rounds delivered.
            rounds: Its rounds.
            seconds: Seconds for which it was decoded; None if they are not known.
        """
        self._window[new].add(TrialSums(tokens, rounds, seconds, requests=1))
        self.complete = min(sums.requests for sums in self._window) >= self._rules.requests * len(self.new)
        if not self.complete:
            return None
        for total, sums in zip(self._totals, self._window, strict=True):
            total.add(sums)
        self._test.add(figure_pairs(*self._window))
        if (decided := self._test.verdict) is not None:
            return self.end(*decided)
        served, most = self._test.pairs * self._rules.requests, self._rules.max_requests
        if most is not None and served >= most:
            return self.end(True, f"no loss was proven in {served} requests per engine that had them")
        return None

    def miss(self, engines: Sequence[str]) -> EngineTrialVerdict | None:
        """Draw a window anew whose requests do not come; return the verdict if that was so too often."""
        self._missed += 1
        if self._missed < _MAX_MISSED:
            self.draw(engines, anew=True)
            return None
        old, new = (sums.requests for sums in self._window)
        return self.end(
            False,
            f"{self._missed} windows could not be compared: in the last one {', '.join(self.new)} with the new weights "
            f"served {new} requests, and {', '.join(self.old)} with the former ones {old}",
        )

    def end(self, promote: bool, reason: str) -> EngineTrialVerdict:
        """Return the verdict of a trial that ends for this reason."""
        test, both = self._test, figure_pairs(*self._totals)
        length, speed = (both.get(name) for name in FIGURES)
        requests = self._totals[True].requests
        return EngineTrialVerdict(promote, reason, test.pairs, requests, length, speed, test.evidence)


class EngineCanary:
    """Gives new weights to a share of the engines, follows what these serve, and takes them back or promotes them.

    Which weights drafted a request, its trajectory says by their version. Requests that were drafted by several
    versions are left out. An engine that rejects a version of the current window ends the trial, and so does one that
    goes away with the new weights: they are rolled back. One that goes away with the former ones is replaced in the
    next window, and one that joins gets the weights that are published to all.

    A trial is not saved. A learner that resumes publishes what was published to all.

    Args:
        publisher: The wire to the engines.
        rules: How weights are tried.
        log: Log of trials.
    """

    def __init__(self, publisher: WeightPublisher, rules: EngineTrialRules, log: MetricsLog) -> None:
        self._publisher, self._rules, self._log = publisher, rules, log
        self._trial: EngineTrial | None = None
        self._trials = 0
        self._new: dict[str, Tensor] = {}
        self._old: dict[str, Tensor] = {}
        self._numbers = {"version": 0, "against": 0}  # under which the trial is known
        self._have: list[str] = []  # engines with the new weights
        self._drafted: dict[int, bool | None] = {}  # window's version -> drafted by new weights; None: not counted
        self._arrived, self._loaded, self._began = 0, False, 0.0  # this window's

    @property
    def trying(self) -> bool:
        """Whether weights are on trial."""
        return self._trial is not None

    def begin(self, new: dict[str, Tensor], old: dict[str, Tensor], against: int) -> int | None:
        """Begin the trial of weights against those that are served.

        Args:
            new: Weights that passed the gate: tensors by name, as the drafter publishes them.
            old: Weights that are served, of the same names, shapes and dtypes.
            against: Version of the latter, 0 if none was published.

        Returns:
            The version under which the first engines get the new weights; None, and no trial, with one engine.
        """
        if len(here := self._engines()) < 2:
            return None
        self._new, self._old, self._have = new, old, []
        self._trial, self._trials = EngineTrial(self._rules, here, self._trials), self._trials + 1
        self._publish_window(self._trial)
        version = next(number for number, new in self._drafted.items() if new)
        self._numbers = {"version": version, "against": against}
        self._log.write("engine_trial", **self._numbers, engines=self._trial.new, of=len(here))
        return version

    def follow(self, arrivals: Sequence[TensorDictBase], publish: Callable[[dict[str, Tensor]], int]) -> None:
        """Take in trajectories that arrived, and do what the trial has come to.

        Args:
            arrivals: Trajectories, batch size ``[]``, with their collector's notes.
            publish: Publishes weights to all engines; returns their version.
        """
        if (trial := self._trial) is None:
            return
        here = self._engines()
        verdict = self._broken_off(trial, here)
        for trajectory in arrivals if verdict is None else ():
            if trial.complete:
                break
            verdict = self._observe(trial, trajectory)
        if not self._loaded and self._have_loaded(trial):
            self._loaded, self._arrived = True, 0
        self._arrived += len(arrivals)
        waits = not self._loaded and time.monotonic() < self._began + _LOADING_S
        if verdict is None and (trial.complete or not set(trial.old) <= set(here)):
            trial.draw(here)
            self._publish_window(trial)
        elif verdict is None and not waits and self._arrived > _PATIENCE * self._rules.requests * len(here):
            if (verdict := trial.miss(here)) is None:
                self._publish_window(trial)
        if verdict is not None:
            self._end(trial, verdict, publish)

    def _engines(self) -> list[str]:
        return sorted(self._publisher.engines)

    def _publish_window(self, trial: EngineTrial) -> None:
        """Publish both weights to the engines of a window, and the former ones to those that drop out."""
        self._drafted, self._arrived, self._loaded, self._began = {}, 0, False, time.monotonic()
        back = [name for name in self._have if name not in (*trial.new, *trial.old)]
        groups = (trial.new, True, self._new), (trial.old, False, self._old), (back, None, self._old)
        for engines, new, weights in sorted(groups, key=lambda group: group[0]):  # the draw does not say who is first
            if engines:
                version = self._publisher.next_version
                self._publisher.publish(version, weights, engines)
                self._drafted[version] = new
        self._have = trial.new

    def _have_loaded(self, trial: EngineTrial) -> bool:
        """Return whether all engines of a window have loaded what was published to them for it."""
        engines, first = self._publisher.engines, min(self._drafted)
        return all(name in engines and (engines[name].acknowledged or 0) >= first for name in (*trial.new, *trial.old))

    def _broken_off(self, trial: EngineTrial, here: Sequence[str]) -> EngineTrialVerdict | None:
        """Return the verdict if something else than figures ends the trial."""
        for version in self._drafted:
            for name, reason in self._publisher.rejected_by(version).items():
                return trial.end(False, f"{name} rejected version {version}: {reason}")
        if gone := [name for name in trial.new if name not in here]:
            return trial.end(False, f"{', '.join(gone)} went away with the new weights")
        return trial.end(False, "fewer than two engines are left") if len(here) < 2 else None

    def _observe(self, trial: EngineTrial, trajectory: TensorDictBase) -> EngineTrialVerdict | None:
        versions = trajectory["rounds", "policy_version"]
        drafted = {self._drafted.get(version) for version in set(versions.tolist())}
        if len(drafted) != 1 or (new := drafted.pop()) is None:
            return None
        tokens, rounds = acceptance_length(trajectory, torch.ones_like(versions, dtype=torch.bool))
        seconds = trajectory.get_non_tensor("seconds", default=None)
        return trial.observe(new=new, tokens=tokens, rounds=rounds, seconds=seconds)

    def _end(
        self, trial: EngineTrial, verdict: EngineTrialVerdict, publish: Callable[[dict[str, Tensor]], int]
    ) -> None:
        new, old = self._new, self._old
        self._trial, self._new, self._old, self._drafted = None, {}, {}, {}
        if verdict.promote:
            published = publish(new)
        else:
            published = self._publisher.next_version
            self._publisher.publish(published, old, trial.new)
        self._log.write("engine_verdict", **self._numbers, published=published, **rounded_verdict(verdict))

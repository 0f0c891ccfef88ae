"""The version of the drafter that drafts now: swaps, trials of new weights, and rollbacks."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.weights import WeightReceiver
from aurora_rl.memory import return_freed_memory
from aurora_rl.policies import DrafterPolicy, TreeShape
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving.canary import RoundTrial, RoundTrialRules
from aurora_rl.serving.watchdog import Fault, Watchdog
from aurora_rl.statistics import rounded_verdict
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.stats import Stats

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Seat:
    """A policy that may draft, with the controller of its trees and what checks it."""

    policy: DrafterPolicy
    controller: TreeController | None
    watchdog: Watchdog | None
    drafts: bool = True  # False once a fault that nothing mends was found
    tree: TreeShape = field(init=False)  # with which new weights begin
    fresh: Tensor = field(init=False)  # slots that got a request since the policy drafted last, [B] bool

    def __post_init__(self) -> None:
        self.tree, self.fresh = self.policy.shape, torch.zeros_like(self.policy.drafted)


class _Kept(NamedTuple):
    """Weights as they are served, and their checksum."""

    weights: dict[str, Tensor]
    digest: str


class Versions:
    """Takes weights from the learner, and says which policy drafts the next round.

    New weights are staged in a thread while rounds go on. Without trials they are swapped in between two rounds. With
    trials they are put into the second policy, on the same slots, and windows of both take turns. Each keeps its own
    cache and catches up when its turn comes. At the end of the trial one of the two drafts alone, and the other takes
    the weights to come. The learner hears of it: weights that were rolled back are rejected, with the reason.

    A second policy of another version is of another drafter. The two are compared from the first round on, by the same
    trial, and the first drafts on unless the second is promoted.

    A watchdog checks who drafts. What it finds is mended if the weights that were published can do it: they are loaded
    again, or those before them, or caches are rebuilt. What comes again, or is no matter of weights, leaves the drafter
    alone until new weights come: lookup and plain decoding go on.

    Arguments are those of :class:`~aurora_rl.serving.server.InferenceServer`, its statistics, and ``watch``: it makes
    the watchdog of a policy; None watches nothing.

    Raises:
        ValueError: There are rules of trials without a second policy.
    """

    def __init__(
        self,
        policy: DrafterPolicy,
        *,
        log: MetricsLog,
        stats: Stats,
        controller: TreeController | None = None,
        receiver: WeightReceiver | None = None,
        trial_rules: RoundTrialRules | None = None,
        second_policy: DrafterPolicy | None = None,
        second_controller: TreeController | None = None,
        watch: Callable[[DrafterPolicy], Watchdog] | None = None,
    ) -> None:
        if trial_rules is not None and second_policy is None:
            raise ValueError("a trial needs a second policy, of another copy of the drafter")
        self._log, self._stats, self._receiver, self._trial_rules = log, stats, receiver, trial_rules
        self._seat = _Seat(policy, controller, watch and watch(policy))
        self._idle: _Seat | None = None  # the policy that does not draft this round
        if second_policy is not None and trial_rules is not None:
            self._idle = _Seat(second_policy, second_controller, watch and watch(second_policy))
        for each in self.policies:
            each.notices_writes = False  # the versions here are published ones; other writes are faults
        # Of the version that is served, the one before it, and the one on trial.
        self._kept = {policy.version: _Kept(_as_served(policy, policy.drafter.published()), "")}
        self._mended: set[tuple[int, str]] = set()  # faults found before: version and cause
        self._trial: RoundTrial | None = None
        self._trials = 0
        self._rolled_back: dict[str, str] = {}  # reasons by checksum: a learner that reconnects offers its newest again
        # Weights are staged and hashed while rounds go on: one thread, so that acknowledgements keep their order.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._staged: tuple[int, Future[tuple[_Seat, _Kept, Callable[[], None]]]] | None = None
        self._compares = self._idle is not None and self._idle.policy.version != policy.version
        if self._idle is not None and self._compares:
            second = self._idle.policy
            self._kept[second.version] = _Kept(_as_served(second, second.drafter.published()), "")
            self._try(self._idle, second.version)

    @property
    def policy(self) -> DrafterPolicy:
        """Policy that drafts the next round."""
        return self._seat.policy

    @property
    def controller(self) -> TreeController | None:
        """Controller of its trees; None keeps their shape."""
        return self._seat.controller

    @property
    def served(self) -> DrafterPolicy:
        """Policy of the version that is served; another may draft the next round, on trial."""
        return next(policy for policy in self.policies if policy.version == self._stats.version)

    @property
    def policies(self) -> list[DrafterPolicy]:
        """Every policy that may draft."""
        return [seat.policy for seat in (self._seat, self._idle) if seat is not None]

    def next_round(self, is_init: Tensor) -> None:
        """Choose who drafts the next round, whose slots with a new request are ``is_init``, ``[B, 1]`` bool."""
        fresh = is_init.flatten().cpu()
        if self._trial is not None:
            self._draft_by(new=self._trial.new)
        seat = self._seat
        if seat.watchdog is not None and seat.drafts:
            earlier = {number: kept.weights for number, kept in self._kept.items() if number < self.policy.version}
            if (fault := seat.watchdog.check(self._kept[self.policy.version].weights, earlier, fresh)) is not None:
                self._mend(fault)
        if self._idle is not None:  # the policy that drafts is told by the environment
            self._idle.fresh |= fresh

    def _draft_by(self, *, new: bool) -> None:
        """Give the turn to the weights on trial, or to those that are served."""
        assert self._idle is not None
        if (self.policy.version != self._stats.version) == new:
            return
        self._seat, self._idle = self._idle, self._seat
        self.policy.renew(self._seat.fresh)
        self._seat.fresh.zero_()

    def _mend(self, fault: Fault) -> None:
        """Do what the fault of the policy that drafts allows, and say so."""
        version, again = self.policy.version, (self.policy.version, fault.cause) in self._mended
        self._mended.add((version, fault.cause))
        before = [number for number in self._kept if number < version]
        began, reason = time.perf_counter(), f"{fault.cause}: {fault.detail}"
        if self._trial is not None and version != self._stats.version:
            self._trial, action = None, f"rolled back to version {self._stats.version}"
            self._draft_by(new=False)
            self._roll_back(version, reason)
        elif fault.cause in ("corrupted", "stale") and not again:
            action = "its weights were loaded again"
            self.policy.install(self._kept[version].weights, version)
            self.policy.reset()
        elif fault.cause == "cache" and not again:
            action = "its caches are rebuilt"
            self.policy.reset()
        elif fault.cause in ("corrupted", "stale", "dead") and before and self._trial is None:
            action = f"rolled back to version {before[-1]}"
            self.policy.install(self._kept[before[-1]].weights, before[-1])
            self.policy.reset()
            if self.controller is not None:
                self.controller.swapped()
            self._roll_back(version, reason)
            self._served(before[-1], began)
        else:
            action = "its drafts are left out until new weights come"
            self._seat.drafts = False
            self.policy.shape = self.rest(self.policy.shape)
        self._log.write(
            "watchdog", version=version, cause=fault.cause, detail=fault.detail, action=action,
            requests=len(self._stats.finished),
        )  # fmt: skip
        logger.warning(
            "the drafter of version %d failed a check (%s): %s; %s", version, fault.cause, fault.detail, action
        )

    def rest(self, shape: TreeShape) -> TreeShape:
        """Return the shape of a round that was to have this one, if faults leave the drafter out."""
        if self._seat.drafts or shape.lookup_only:
            return shape
        if self.controller is not None:
            return self.controller.without_drafter(shape)
        return shape.without_drafter(shape.lookup) if shape.lookup else replace(shape, depth=0, num_nodes=0)

    def observe(self, tokens: int, occupied: int, seconds: float) -> None:
        """Take in a round that the policy drafted for: tokens delivered, slots that took part, and wall time."""
        if self._seat.watchdog is not None:
            self._seat.watchdog.observe(tokens / occupied - 1)
        if self._trial is None or (verdict := self._trial.observe(tokens, occupied, seconds)) is None:
            return
        (version,) = {policy.version for policy in self.policies} - {self._stats.version}
        self._trial = None
        self._log.write(
            "verdict",
            version=version,
            against=self._stats.version,
            requests=len(self._stats.finished),
            **rounded_verdict(verdict),
        )
        began = time.perf_counter()
        self._draft_by(new=verdict.promote)
        if verdict.promote:
            self._served(version, began)
        else:
            self._roll_back(version, f"rolled back after {verdict.rounds} rounds: {verdict.reason}")

    def take(self) -> None:
        """Swap in the newest weights, or begin their trial, once they are ready."""
        if self._receiver is None or self._trial is not None:
            return
        if self._staged is None and (received := self._receiver.latest()) is not None:
            version, weights = received
            named = dict(weights.flatten_keys(".").items())
            self._staged = version, self._background.submit(self._stage, named, version)
        if self._staged is None or not self._staged[1].done():
            return
        (version, staged), self._staged = self._staged, None
        began = time.perf_counter()
        try:
            seat, kept, put = staged.result()
            if kept.digest in self._rolled_back:  # while it was staged
                raise ValueError(self._rolled_back[kept.digest])
            put()
        except Exception as error:  # whatever a drafter does, the requests are served
            reason = str(error) if isinstance(error, ValueError) else repr(error)
            self._receiver.reject(version, reason)
            self._log.write("swap_failed", version=version, reason=reason)
            return
        self._kept[version] = kept
        if not seat.drafts:
            seat.drafts = True
            seat.policy.reset()
        if seat is not self._seat:
            seat.controller = copy.deepcopy(self.controller)
            self._try(seat, version)
            return
        seat.policy.shape = seat.tree
        if seat.controller is not None:
            seat.controller.swapped()
        self._served(version, began)

    def _stage(self, weights: dict[str, Tensor], version: int) -> tuple[_Seat, _Kept, Callable[[], None]]:
        digest = checksum(weights)
        if digest in self._rolled_back:
            raise ValueError(self._rolled_back[digest])
        # Weights that are served already, as a learner that resumes publishes them, need no trial but their number.
        served = self._kept[self._stats.version].digest or checksum(dict(self._seat.policy.drafter.published()))
        seat = self._seat if self._idle is None or digest == served else self._idle
        put = seat.policy.stage(weights, version)
        return seat, _Kept(_as_served(seat.policy, weights), digest), put

    def _try(self, seat: _Seat, version: int) -> None:
        """Begin the trial of the weights that were put into the policy of a seat."""
        assert self._trial_rules is not None
        seat.policy.shape = seat.tree
        if seat.controller is not None:
            seat.controller.swapped()
        self._trial, self._trials = RoundTrial(self._trial_rules, self._trials), self._trials + 1
        self._log.write("trial", version=version, against=self._stats.version, requests=len(self._stats.finished))

    def _served(self, version: int, began: float) -> None:
        """Note that a version drafts every round from now on, since the time ``began``."""
        milliseconds = (time.perf_counter() - began) * 1e3
        self._stats.swap_ms.append(milliseconds)
        self._stats.versions.append(version)
        served = self._stats.versions[-1:] if self._compares else self._stats.versions[-2:]  # both are of one drafter
        self._kept = {number: kept for number, kept in self._kept.items() if number in served}
        self._log.write("swap", version=version, ms=round(milliseconds, 3), requests=len(self._stats.finished))
        # These tensors stay what they are: the next swap puts others in their place.
        if self._receiver is not None:
            self._background.submit(self._acknowledge, version, self.policy.drafter.published(), milliseconds)

    def _roll_back(self, version: int, reason: str) -> None:
        """Tell the learner that weights are not served, now or when they come again."""
        self._rolled_back[self._kept.pop(version).digest] = reason
        if self._receiver is not None:
            self._receiver.reject(version, reason)

    def _acknowledge(self, version: int, loaded: dict[str, Tensor], milliseconds: float) -> None:
        assert self._receiver is not None
        self._receiver.acknowledge(version, checksum(loaded), milliseconds)
        return_freed_memory()  # memory of the replaced weights and of the message

    def close(self) -> None:
        """Take no more weights, and close the wire."""
        self._background.shutdown()
        if self._receiver is not None:
            self._receiver.close()


def _as_served(policy: DrafterPolicy, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy weights into the form in which the policy serves them."""
    served = policy.drafter.published()
    return {name: tensor.to(served[name], copy=True) for name, tensor in weights.items()}

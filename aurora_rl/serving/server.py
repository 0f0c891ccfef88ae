"""The inference server: rounds, baseline windows, swaps between rounds, trajectories to the sink."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from tensordict import TensorDictBase

from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightReceiver
from aurora_rl.envs import Completion, Request, SpecDecodeEnv
from aurora_rl.policies import DrafterPolicy, TreeShape
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.policies.tree_controller import TreeController, observe_round
from aurora_rl.serving.canary import RoundTrialRules
from aurora_rl.serving.versions import Versions
from aurora_rl.serving.watchdog import Watchdog
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows, Round
from aurora_rl.telemetry.stats import Stats
from aurora_rl.trajectories import acceptance_length, accepted_per_round
from aurora_rl.trajectory_parts import part_is_due, part_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Deleted:
    """Counts of what a server dropped of a tenant's data.

    Attributes:
        prefixes: Texts whose rows were in the engine's prefix cache.
        answers: Answers in which lookup searched.
        trajectories: Trajectories that waited for the learner.
        learner: "told" if a learner was connected, which drops what it has. "absent" if none was: the next one is told
            when it connects, as long as this server runs.
    """

    prefixes: int
    answers: int
    trajectories: int
    learner: Literal["told", "absent"]


class Capture:
    """Decides about each request. One that is not captured is served as with ``learn=False``.

    Args:
        rate: Share of the requests that are captured, 0 to 1.
        opt_out: Tenants whose requests never are.
        seed: Key of the hash of a request's id that chooses the share, so that a run chooses the same again.

    Example:
        >>> import torch
        >>> capture, prompt = Capture(0.25, opt_out=["a"]), torch.tensor([3])
        >>> sum(capture(Request(id, prompt)) for id in range(1000))
        266
        >>> any(capture(Request(id, prompt, tenant="a")) for id in range(1000))
        False
    """

    def __init__(self, rate: float = 1.0, opt_out: Collection[str] = (), seed: int = 0) -> None:
        self._rate, self._opt_out, self._seed = rate, frozenset(opt_out), seed

    def __call__(self, request: Request) -> bool:
        """Return whether a request is captured."""
        if not request.learn or request.tenant in self._opt_out:
            return False
        digest = hashlib.blake2b(f"{self._seed}/{request.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self._rate * 2**64


class InferenceServer:
    """Drives ``policy`` and ``env.step_and_maybe_reset`` round by round; nothing it does waits for the learner.

    Args:
        env: Environment that records trajectories; the server sets its ``on_completion``.
        policy: Policy of the drafter on the same engine.
        windows: Chooses the rounds that decode plainly.
        log: Log of requests and swaps.
        controller: Chooses the shape of every round's drafts; None keeps the policy's.
        sink: Takes trajectories; None if nobody learns.
        receiver: Brings weights; None if nobody learns.
        trial_rules: How new weights are tried before they draft every round; None swaps them in at once.
        second_policy: Policy of another copy of the drafter on the same engine, for trials; or of another drafter and
            version, which is compared with the first.
        second_controller: Chooses the shape of the second drafter's drafts.
        watched: Whether the drafter is checked while it serves.
        note: Called with each completion; returns its domain.
        captures: Called with each request that ended, or of which a part is written; returns whether it is captured.
            None captures all whose ``learn`` is true.
        part_tokens: Tokens of an answer after which what is written of it is sent to the learner, while it goes on, see
            :mod:`aurora_rl.trajectory_parts`; None sends requests when they have ended.

    Attributes:
        stats: Statistics of the run so far.
        versions: Which of the drafter's versions drafts now.
    """

    def __init__(
        self,
        env: SpecDecodeEnv,
        policy: DrafterPolicy,
        *,
        windows: BaselineWindows,
        log: MetricsLog,
        controller: TreeController | None = None,
        sink: TrajectorySink | None = None,
        receiver: WeightReceiver | None = None,
        trial_rules: RoundTrialRules | None = None,
        second_policy: DrafterPolicy | None = None,
        second_controller: TreeController | None = None,
        watched: bool = False,
        note: Callable[[Completion], str] = lambda completion: "",
        captures: Callable[[Request], bool] | None = None,
        part_tokens: int | None = None,
    ) -> None:
        self.env, self.stats = env, Stats(policy.version)
        self.versions = Versions(
            policy,
            log=log,
            stats=self.stats,
            controller=controller,
            receiver=receiver,
            trial_rules=trial_rules,
            second_policy=second_policy,
            second_controller=second_controller,
            watch=partial(Watchdog, engine=env.engine) if watched else None,
        )
        env.on_completion = self.completed
        self._windows, self._log, self._sink, self._note = windows, log, sink, note
        self._receiver, self._captures, self._part_tokens = receiver, captures or Capture(), part_tokens
        self._td: TensorDictBase | None = None
        self._recording = 0.0
        # Of the requests in flight: in which rounds drafts were asked for, where the part begins that is written now,
        # and the time of its first round.
        self._asked: dict[int, list[bool]] = {}
        self._first: dict[int, int] = {}
        self._began: dict[int, float] = {}
        for each in self.versions.policies:
            each.on_fault = self._fault

    @property
    def policy(self) -> DrafterPolicy:
        """Policy that drafts the next round."""
        return self.versions.policy

    @property
    def depth(self) -> int:
        """Longest path of the trees that are drafted now."""
        return self.policy.shape.depth

    @property
    def drops(self) -> Counter[str]:
        """Trajectories that no learner took, by reason; see :attr:`TrajectorySink.drops`."""
        return self._sink.drops if self._sink is not None else Counter()

    @property
    def sent(self) -> int:
        """Trajectories handed to a learner."""
        return self._sink.sent if self._sink is not None else 0

    @property
    def queued(self) -> int:
        """Trajectories that wait to be sent."""
        return self._sink.queued if self._sink is not None else 0

    @property
    def prefix_cache_queries(self) -> int:
        """Prompt tokens that were looked for in the prefix cache."""
        cache = self.env.engine.prefix_cache
        return cache.queries if cache is not None else 0

    @property
    def prefix_cache_hits(self) -> int:
        """Prompt tokens that were found in the prefix cache, and not read again."""
        cache = self.env.engine.prefix_cache
        return cache.hits if cache is not None else 0

    @property
    def refused(self) -> str | None:
        """Why the learner refuses this server; None if it does not."""
        return self._receiver.error if self._receiver is not None else None

    def step(self) -> bool:
        """Run one round. Return False if there was nothing to decode."""
        self.versions.take()
        env = self.env
        if self._td is None or not env.num_active:
            self._td = env.reset()
            if not env.num_active:
                return False
        self.versions.next_round(self._td["is_init"])
        policy = self.policy
        occupied, baseline = len(env.engine.store.occupied), not self._windows.speculate
        # The last request may be cancelled while a prompt is read.
        controller = self.versions.controller if occupied else None
        if controller is not None and not baseline:
            self._reshape(controller, self.versions.rest(controller.choose(occupied)), occupied)
            policy.min_path_probability = controller.price(policy.shape, occupied)
        policy.speculate = not baseline and policy.shape.depth > 0
        prefill, recorded, self._recording = env.engine.prefill_seconds, env.recording_seconds, 0.0
        completed = len(self.stats.finished)
        began = time.perf_counter()
        action = policy(self._td)
        # A drafter that failed its slots together leaves the trees of each alone, for the last time.
        asked = policy.drafted | policy.looked_up | action["draft", "mask"].any(1).cpu()
        speculative, counted, drafted = False, False, 0
        for slot in env.engine.store.occupied.tolist():
            request = env.request_of(slot)
            speculative |= request.speculative
            counted |= request.counted
            self._asked.setdefault(request.id, []).append(bool(asked[slot]))
            self._first.setdefault(request.id, int(env.engine.store.prompt_lengths[slot]))
            self._began.setdefault(request.id, began)
            drafted += bool(asked[slot])
        done, self._td = env.step_and_maybe_reset(action)
        self._send_parts()
        # Recording is a cost of speculation, in whichever round it happens.
        recording = self._recording + env.recording_seconds - recorded
        seconds = time.perf_counter() - began - (env.engine.prefill_seconds - prefill)
        tokens = int(done["next", "reward"].sum())
        if controller is not None:
            observe_round(controller, policy, done, occupied, seconds)
        if occupied and not counted:
            return True
        if baseline:
            seconds -= recording
            self.stats.rounds.append(Round(True, occupied, 0, recording, completed, count=0))
        if baseline or speculative:  # a round without drafts allowed says nothing of speculation
            self.stats.rounds.append(Round(not baseline, occupied, tokens, seconds, completed, drafted=drafted))
        self.stats.drafted["baseline" if baseline else self._drafted()] += 1
        self._windows.spent(seconds)
        if speculative and not baseline:
            self.versions.observe(tokens, occupied, seconds)
        return True

    def _drafted(self) -> str:
        """Name what the policy has drafted in this round."""
        if bool(self.policy.drafted.any()):
            return "tree" if self.policy.shape.width > 1 else "chain"
        return "ngrams" if bool(self.policy.looked_up.any()) else "plain"

    def _reshape(self, controller: TreeController, shape: TreeShape, occupied: int) -> None:
        if shape != self.policy.shape:
            self.policy.shape = shape
            acceptance = [round(passed, 4) for passed in controller.acceptance(shape)]
            self._log.write(
                "shape", depth=shape.depth, width=shape.width, nodes=shape.num_nodes, lookup_only=shape.lookup_only,
                acceptance=acceptance, occupied=occupied,
            )  # fmt: skip

    def _send_parts(self) -> None:
        """Send the learner what is written of requests that go on, if it is enough for a part."""
        if self._sink is None or self._part_tokens is None:
            return
        store = self.env.engine.store
        for slot in store.occupied.tolist():
            request, length = self.env.request_of(slot), int(store.lengths[slot])
            first = self._first.get(request.id, length)  # one that has just entered has none
            if part_is_due(length, first, self._part_tokens) and request.counted and self._captures(request):
                now = time.perf_counter()
                self._sink.extend(self.env.trajectory_from(slot, first), request.tenant, now - self._began[request.id])
                self._first[request.id], self._began[request.id] = length, now

    def completed(self, completion: Completion) -> None:
        """Record a request that ended, and send its trajectory, or what has been written since its last part."""
        began = time.perf_counter()
        domain, trajectory = self._note(completion), completion.trajectory
        assert trajectory is not None, "the server's environment records"
        asked = torch.tensor(self._asked.pop(completion.request.id))
        decoding, first = began - self._began.pop(completion.request.id), self._first.pop(completion.request.id)
        if not completion.request.counted:
            return
        tokens, rounds = acceptance_length(trajectory, asked)
        covered = torch.isin(completion.tokens, self.policy.drafter.draft_vocab.cpu()).float().mean()
        accepted, drafted = accepted_per_round(trajectory)
        note_request(
            completion,
            domain,
            self.stats,
            self._log,
            speculative_tokens=tokens,
            speculative_rounds=rounds,
            drafted_tokens=int(drafted.sum()),
            accepted=dict(sorted(Counter(accepted[drafted > 0].tolist()).items())),
            versions=sorted(set(trajectory["rounds", "policy_version"].tolist())),
            depth=self.policy.shape.depth,
            coverage=round(float(covered), 4),
        )
        if self._captures(completion.request):
            if self.policy.earlier is not None:
                self.policy.earlier.add(completion.tokens.numpy(), completion.request.salt)
            if self._sink is not None:
                self._sink.extend(part_of(trajectory, first), completion.request.tenant, decoding)
        self._recording += time.perf_counter() - began

    def delete(self, tenant: str) -> Deleted:
        """Drop between two rounds what is kept of a tenant's requests that ended, and tell the learner to do so."""
        engine, sink, earlier = self.env.engine, self._sink, self.policy.earlier
        for policy in self.versions.policies:
            policy.delete(tenant)
        return Deleted(
            prefixes=0 if engine.prefix_cache is None else engine.prefix_cache.delete(tenant),
            answers=0 if earlier is None else earlier.delete(tenant),
            trajectories=0 if sink is None else sink.delete(tenant),
            learner="absent" if sink is None or not sink.connected else "told",
        )

    def cancel(self, request: int) -> None:
        """Drop a request between two rounds, and its record with it; its slot is free for the next."""
        if self.env.cancel(request):
            for kept in (self._asked, self._first, self._began):
                kept.pop(request, None)
            if self._td is not None:  # the policy checks that both stand at the same place
                self._td["observation", "position"].copy_(self.env.engine.store.lengths - 1)

    def _fault(self, slot: int, fault: str) -> None:
        """Note that a slot's request goes on without the drafter."""
        request = self.env.request_of(slot).id
        self.note_fault(fault, self.policy.version, f"request {request} goes on without the drafter", request)

    def note_fault(self, fault: str, version: int, outcome: str, request: int | None = None) -> None:
        """Count and log a fault of the drafter, and warn of the first one and its outcome.

        Args:
            fault: What the drafter did.
            version: Version of its weights.
            outcome: What becomes of it.
            request: Id of the request that it failed; None if there was none yet.
        """
        self.stats.drafter_faults += 1
        self._log.write("drafter_fault", request=request, version=version, fault=fault)
        if self.stats.drafter_faults == 1:
            logger.warning("%s: %s", outcome, fault)

    def save_drafter(self, folder: str | os.PathLike[str]) -> None:
        """Save the drafter that is served, if it has weights; what is on trial is not."""
        if (drafter := self.versions.served.drafter).formats:
            save_drafter(drafter, folder)

    def close(self) -> None:
        """Send the trajectories that can still be sent, and close the wire."""
        if self._sink is not None:
            self._sink.close(timeout=2.0)
        self.versions.close()


def note_request(
    completion: Completion,
    domain: str,
    stats: Stats,
    log: MetricsLog,
    *,
    speculative_tokens: int,
    speculative_rounds: int,
    drafted_tokens: int,
    accepted: Mapping[int, int],
    versions: Sequence[int],
    depth: int,
    coverage: float | None,
) -> None:
    """Count a request that ended, and write its event "request".

    Args:
        completion: Text of the request, and how it ended.
        domain: Domain of the request, empty if it has none.
        stats: Statistics of the run, which are changed.
        log: Log of the event.
        speculative_tokens: Number of tokens that speculative rounds delivered.
        speculative_rounds: Number of speculative rounds.
        drafted_tokens: Number of drafted tokens.
        accepted: Number of rounds by the number of drafts that they accepted.
        versions: Versions of the drafter's weights that drafted, oldest first.
        depth: Depth of the trees that were drafted when it ended.
        coverage: Share of the completion's tokens that the draft vocabulary has; None if that is not known.
    """
    stats.finish(domain, len(completion.tokens), speculative_tokens, speculative_rounds)
    log.write(
        "request",
        request=completion.request.id,
        domain=domain,
        prompt_tokens=len(completion.request.prompt),
        tokens=len(completion.tokens),
        terminated=completion.terminated,
        speculative_tokens=speculative_tokens,
        speculative_rounds=speculative_rounds,
        drafted_tokens=drafted_tokens,
        accepted=accepted,
        versions=versions,
        depth=depth,
        coverage=coverage,
    )

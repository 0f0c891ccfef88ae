"""The inference server: rounds, control windows, swaps between rounds, trajectories to the sink."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weight_sync import WeightReceiver
from aurora_rl.envs import Completion, Engine, SpecDecodeEnv
from aurora_rl.figures import Figures
from aurora_rl.metrics import MetricsLog
from aurora_rl.policies import DrafterPolicy
from aurora_rl.policies.length import LengthController
from aurora_rl.throughput import ControlWindows, Round
from aurora_rl.trajectories import acceptance_length, accepted_per_round
from aurora_rl.trees import depths

logger = logging.getLogger(__name__)


class InferenceServer(Figures):
    """Drives ``policy`` and ``env.step_and_maybe_reset`` round by round; nothing it does waits for the learner.

    Args:
        env: the environment; its ``on_completion`` must be :meth:`completed`.
        policy: the drafter's policy on the same engine.
        windows: which rounds decode plainly.
        log: where requests and swaps are written.
        length: adapts the depth of the drafts; None keeps the policy's shape.
        sink: takes trajectories; None where nobody learns.
        receiver: brings weights; None where nobody learns.
        note: called with each completion; returns its domain.
    """

    def __init__(
        self,
        env: SpecDecodeEnv,
        policy: DrafterPolicy,
        *,
        windows: ControlWindows,
        log: MetricsLog,
        length: LengthController | None = None,
        sink: TrajectorySink | None = None,
        receiver: WeightReceiver | None = None,
        note: Callable[[Completion], str] = lambda completion: "",
    ) -> None:
        super().__init__(policy.version)
        self.env, self.policy = env, policy
        self._windows, self._log, self._length = windows, log, length
        self._sink, self._receiver, self._note = sink, receiver, note
        self._td = None
        self._recording = 0.0
        policy.on_fault = self._fault
        # Weights are made ready, and hashed, beside the rounds: one thread, so that acknowledgements keep their order.
        self._background = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._staged: tuple[int, Future[Callable[[], None]]] | None = None

    @property
    def depth(self) -> int:
        """See :attr:`Figures.depth`."""
        return self.policy.shape.depth

    @property
    def dropped(self) -> int:
        """See :attr:`Figures.dropped`."""
        return self._sink.dropped if self._sink is not None else 0

    def step(self) -> bool:
        """One round. False where there was nothing to decode."""
        self._swap()
        env, policy = self.env, self.policy
        if self._td is None or not env.num_active:
            self._td = env.reset()
            if not env.num_active:
                return False
        occupied, policy.speculate = env.num_active, self._windows.speculate
        prefill, recorded, self._recording = env.engine.prefill_seconds, env.recording_seconds, 0.0
        completed = len(self.finished)
        began = time.perf_counter()
        done, self._td = env.step_and_maybe_reset(policy(self._td))
        # Recording is a cost of speculation, in whichever round it happens.
        recording = self._recording + env.recording_seconds - recorded
        seconds = time.perf_counter() - began - (env.engine.prefill_seconds - prefill)
        tokens = int(done["next", "reward"].sum())
        if not policy.speculate:
            seconds -= recording
            self.rounds.append(Round(True, occupied, 0, recording, completed))
        self.rounds.append(Round(policy.speculate, occupied, tokens, seconds, completed))
        self._windows.spent(seconds)
        if policy.speculate and self._length is not None:
            self._adapt(done, seconds)
        return True

    def _adapt(self, done: Any, seconds: float) -> None:
        assert self._length is not None
        drafted = done["draft", "mask"]
        rows = drafted.any(1)
        depth = (depths(done["draft", "parents"]) * drafted).amax(1)
        accepted = done["next", "verifier", "accepted"].sum(1)
        # Where a request ended inside the path, what lies behind its last token was not judged.
        depth = torch.where(done["next", "verifier", "bonus_token"] < 0, accepted, depth)
        # What n-grams had accepted below the drafter's tree says nothing about a deeper tree of the drafter.
        accepted, depth = (part.clamp(max=self.policy.shape.depth) for part in (accepted, depth))
        self._length.observe(accepted[rows], depth[rows], seconds)
        if self._length.depth != self.policy.shape.depth:
            shape = self.policy.shape
            self.policy.shape = dataclasses.replace(shape, depth=self._length.depth)
            self._log.write("depth", depth=self._length.depth, acceptance=self._length.acceptance)

    def completed(self, completion: Completion) -> None:
        """Record a request that ended and hand its trajectory on."""
        began = time.perf_counter()
        domain, trajectory = self._note(completion), completion.trajectory
        assert trajectory is not None, "the server's environment records"
        tokens, rounds = acceptance_length(trajectory)
        covered = torch.isin(completion.tokens, self.policy.drafter.draft_vocab.cpu()).float().mean()
        self.finished.append((tokens, rounds))
        accepted, drafted = accepted_per_round(trajectory)
        self._log.write(
            "request",
            request=completion.request.id,
            domain=domain,
            tokens=len(completion.tokens),
            terminated=completion.terminated,
            speculative_tokens=tokens,
            speculative_rounds=rounds,
            accepted=dict(sorted(Counter(accepted[drafted > 0].tolist()).items())),
            versions=sorted(set(trajectory["rounds", "policy_version"].tolist())),
            depth=self.policy.shape.depth,
            coverage=round(float(covered), 4),
        )
        if self._sink is not None:
            self._sink.extend(trajectory)
        self._recording += time.perf_counter() - began

    def _fault(self, slot: int, fault: str) -> None:
        """A slot's request goes on without speculation."""
        request = self.env.request_of(slot)
        self.drafter_faults += 1
        self._log.write("drafter_fault", request=request.id, version=self.version, fault=fault)
        if self.drafter_faults == 1:
            logger.warning("request %d goes on without speculation: %s", request.id, fault)

    def _swap(self) -> None:
        """Swap in the newest weights between two rounds, once they are ready."""
        if self._receiver is None:
            return
        if self._staged is None and (received := self._receiver.latest()) is not None:
            version, weights = received
            self._staged = version, self._background.submit(self.policy.stage, _named(weights), version)
        if self._staged is None or not self._staged[1].done():
            return
        (version, staged), self._staged = self._staged, None
        began = time.perf_counter()
        try:
            staged.result()()
        except ValueError as error:
            self._receiver.reject(version, str(error))
            self._log.write("swap_failed", version=version, reason=str(error))
            return
        milliseconds = (time.perf_counter() - began) * 1e3
        self.swap_ms.append(milliseconds)
        self.versions.append(version)
        self._log.write("swap", version=version, ms=round(milliseconds, 3), requests=len(self.finished))
        # These tensors stay what they are: the next swap puts others in their place.
        self._background.submit(self._acknowledge, version, self.policy.drafter.published(), milliseconds)

    def _acknowledge(self, version: int, loaded: dict[str, Tensor], milliseconds: float) -> None:
        assert self._receiver is not None
        self._receiver.acknowledge(version, checksum(loaded), milliseconds)


def _named(weights: Any) -> dict[str, Tensor]:
    """Tensors of a TensorDict by their dotted names."""
    return {
        name if isinstance(name, str) else ".".join(name): tensor
        for name, tensor in weights.items(include_nested=True, leaves_only=True)
    }


@torch.inference_mode()
def measure_rounds(
    engine: Engine, policy: DrafterPolicy, prompt: Tensor, *, repeats: int = 6
) -> dict[str, list[float]]:
    """Time verification and drafting at every depth on this machine, every slot occupied, before serving starts.

    Args:
        engine: an engine whose slots are free.
        policy: a policy on it; its shape gives width and budget, and its depth the deepest that is tried.
        prompt: ``[P]`` tokens to put into each slot.
        repeats: timings of each; the least counts, which other work on the machine disturbs least.

    Returns:
        Seconds by depth 0 to the shape's: "verify", "draft" and "round", both together.
    """
    shape = policy.shape
    slots = torch.arange(engine.num_slots)
    engine.prefill(slots.tolist(), [prompt] * engine.num_slots)
    fresh = torch.ones(engine.num_slots, 1, dtype=torch.bool)
    depths_tried = range(shape.depth + 1)
    verify, draft = ([math.inf] * len(depths_tried) for _ in range(2))
    policy.draft(fresh)
    for _ in range(repeats):
        # Depths take turns, so that a machine whose speed drifts treats them alike.
        for depth in depths_tried:
            policy.shape = dataclasses.replace(shape, depth=depth)
            policy.drafter.cached.clamp_(max=max(len(prompt) - 2 - depth // 2, 0))  # what a round would have to add
            began = time.perf_counter()
            tree = policy.draft(~fresh)
            drafted = time.perf_counter()
            nodes = (tree[key][:, : policy.shape.budget] for key in ("tokens", "parents", "mask"))
            engine.logits(engine.verify(slots, *nodes)).argmax(-1)
            verify[depth] = min(verify[depth], time.perf_counter() - drafted)
            draft[depth] = min(draft[depth], drafted - began)
    policy.shape = shape
    for slot in slots.tolist():
        engine.release(slot)
    engine.prefill_seconds = 0.0
    policy.drafter.forget(slots)
    # A deeper round is no cheaper than a shallower one; where it looks so, the shallower was disturbed.
    total = [min(v + d for v, d in zip(verify[i:], draft[i:], strict=True)) for i in depths_tried]
    return {"verify": verify, "draft": draft, "round": total}

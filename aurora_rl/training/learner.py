"""The learner: collect, learn, and publish what passes the gate."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.objectives import LossModule

from aurora_rl.collectors.codec import checksum
from aurora_rl.memory import return_freed_memory
from aurora_rl.objectives import Objective
from aurora_rl.policies import Drafter
from aurora_rl.policies.drafter import check_weights
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.storage import CheckpointError
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.training.checkpoint import newest_training_state, save_training_state
from aurora_rl.training.engine_canary import EngineCanary
from aurora_rl.training.gate import Gate
from aurora_rl.training.moving_vocab import MovingVocab, vocab_of_state
from aurora_rl.training.replay import NewestTrajectories
from aurora_rl.training.retention import AgeLimit, is_deleted
from aurora_rl.training.served_weights import StartCheck, WeightAudit, with_weights
from aurora_rl.training.shares import engine_of, in_turns
from aurora_rl.training.states import add_state
from aurora_rl.training.steps import has_finite_step, rounded, train_step
from aurora_rl.training.wire_ends import TrajectorySource, WeightSink
from aurora_rl.training.wire_notes import WireNotes
from aurora_rl.trajectories import pack

logger = logging.getLogger(__name__)

_STATE = "the training state"
_STREAM = "stream.pt"  # file of a training state: replay buffer and other state from trajectories
_ELSEWHERE = ("drafter", "draft_vocab", "optimizers", "serving")  # parts of a training state that are not in it
_MAX_TOLD = 64  # engines that reject a version: a peer may make up ever new names
_COUNTS = "seen steps skipped version _skipped_in_a_row _credit _since_candidate _decided_steps".split()


class Learner:
    """Learns from trajectories as they arrive and replays old ones in between.

    Args:
        drafter: Drafter in training, float32.
        loss: Objective on packed batches.
        optimizers: Optimizers of the drafter's parameters.
        buffer: Replay buffer from :func:`~aurora_rl.training.replay.trajectory_buffer`.
        collector: Brings trajectories.
        publisher: Takes weights.
        gate: Decides about candidates.
        log: Log of steps, candidates and decisions.
        serving_dtype: Dtype of published weights.
        batch_size: New trajectories of an optimizer step.
        replay: Most replayed batches for each batch of new trajectories, taken while nothing new waits.
        publish_every: New trajectories between two candidates.
        max_skipped: Most steps in a row without a finite loss and gradient that no single trajectory explains.
        states: Folder of the training states. Published drafters are kept next to it, in ``versions``.
        keep: Published drafters that are kept.
        keep_states: Training states that are kept.
        save_buffer: Whether a training state holds the replay buffer, which has users' text. A learner that resumes
            from such a state goes on exactly as if it had not stopped.
        max_age: Seconds from the end of a request after which its trajectory is dropped; None keeps it.
        once: Whether a trajectory is dropped after the gradient step that it was taken for.
        outputs: Writes the training state.
        canary: Tries new weights at a share of the engines first; None publishes them to all at once.
        vocab: Lets the draft vocabulary follow what the requests in the replay buffer say; None leaves it as it is.

    Attributes:
        seen: Trajectories learned from.
        steps: Optimizer steps.
        skipped: Steps that were left out because loss or gradient were not finite.
        version: Newest published version.
    """

    def __init__(
        self,
        *,
        drafter: Drafter,
        loss: LossModule,
        optimizers: list[torch.optim.Optimizer],
        buffer: ReplayBuffer,
        collector: TrajectorySource,
        publisher: WeightSink,
        gate: Gate,
        log: MetricsLog,
        serving_dtype: torch.dtype,
        batch_size: int,
        replay: int,
        publish_every: int,
        max_skipped: int,
        states: str | os.PathLike[str],
        keep: int = 5,
        keep_states: int = 3,
        save_buffer: bool = False,
        max_age: float | None = None,
        once: bool = False,
        outputs: Outputs,
        canary: EngineCanary | None = None,
        vocab: MovingVocab | None = None,
    ) -> None:
        self._drafter, self._loss, self._optimizers = drafter, loss, optimizers
        self._buffer, self._collector, self._publisher, self._gate = buffer, collector, publisher, gate
        self._replayed = cast("NewestTrajectories", buffer.storage)
        self._log, self._dtype, self._states = log, serving_dtype, Path(states)
        self._batch_size, self._replay, self._publish_every = batch_size, replay, publish_every
        self._max_skipped, self._skipped_in_a_row, self._canary = max_skipped, 0, canary
        self.outputs, self._keep, self._versions = outputs, keep, self._states.parent / "versions"
        self._keep_states, self._save_buffer = keep_states, save_buffer
        self._vocab, self._adapters = vocab, [] if drafter.adapters is None else list(drafter.adapters.names)
        self._new: list[TensorDictBase] = []
        self._notes = WireNotes(collector, publisher, log)
        self._sound: TensorDictBase | None = None  # the last new trajectory on which a step was taken
        self._credit = self._since_candidate = self._decided_steps = 0
        self._age_limit, self._once, self._serving = AgeLimit(max_age), once, self._as_served(drafter.published())
        self._replaced: dict[str, Tensor] | None = None  # weights served before, until the newest is withdrawn
        self._rejecting: set[str] = set()  # engines that rejected the newest, as told
        self._start_check = StartCheck(self._serving, log)
        self._audit = WeightAudit(drafter, self._serving, serving_dtype, log)
        self.seen = self.steps = self.skipped = self.version = 0

    def _as_served(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of weights as they would be served."""
        device = self._drafter.draft_vocab.device
        return {
            name: t.to(device, self._dtype if t.is_floating_point() else t.dtype, copy=True)
            for name, t in weights.items()
        }

    def resume(self, folder: str | os.PathLike[str]) -> None:
        """Continue from the newest training state of a folder that is whole.

        What was served when it was written is published again, since an engine may have started over. The weights in
        training go on from where they were, and are published once they pass the gate.

        Raises:
            CheckpointError: There is no such state, or it is of another drafter. Nothing is changed then.
        """
        state, skipped = newest_training_state(folder)
        progress, serving = state.progress, state.weights("serving")
        if (names := progress.get("adapters", [])) != self._adapters:
            raise CheckpointError(
                f"{folder} was trained with drafter.adapters={names}, and this run has {self._adapters}; set the "
                "same, or start from the drafter of that run (drafter.path) to have others"
            )
        put, own = state.stage(self._drafter, self._optimizers), self._drafter.draft_vocab
        vocab = vocab_of_state(state, own, follows=self._vocab is not None)
        if serving is not None:
            try:
                check_weights(self._serving, serving)
            except ValueError as error:
                raise CheckpointError(f"{state.folder}: of the served weights {error}") from error
        stream: Mapping[str, Any] | None = None
        if self._save_buffer and (state.folder / _STREAM).exists():
            stream = torch.load(state.folder / _STREAM, weights_only=True)
            if len(stream["objectives"]) != len(self._objectives()):
                raise CheckpointError(
                    f"{state.folder / _STREAM} is of a run with {len(stream['objectives'])} objectives, this one has "
                    f"{len(self._objectives())}; set checkpoint.buffer=false to go on without its replay buffer"
                )
        put()
        self._drafter.draft_vocab = vocab
        if stream is not None:
            self._load_stream(stream)
        self.seen, self.steps, self.version = progress["seen"], progress["steps"], progress["version"]
        self._decided_steps = progress.get("decided_steps", 0)
        newest, version = str(state.folder), None
        if serving is not None:  # else it is of aurora-rl train, and nothing was served
            self._serving = self._as_served(state.weights("replaced") or serving)
            version = self._publish(self._as_served(serving))
        self._log.write("resumed", state=newest, skipped=skipped, version=version, seen=self.seen, steps=self.steps)

    def step(self, wait_s: float = 0.2) -> bool:
        """Take what arrived, and learn from one batch. Return False if there was nothing to do."""
        busy = len(self._new) >= self._batch_size or self._credit > 0
        arrivals = self._collector.poll(timeout_s=0.0 if busy else wait_s)
        self._notes.arrived(arrivals)
        arrivals = self._retained(arrivals)
        self._audit.check(arrivals)
        self._admit(self._gate.admit(arrivals))
        if self._notes.write(self.steps, self.version) and not self.version:
            self._start_check.check(self._publisher.served)
        self._note_rejections()
        if self._canary is not None:
            self._canary.follow(arrivals, self._publish)
        if self.version and self._publisher.overtaken:
            self._publish(self._serving)
            self._log.write("renumbered", version=self.version, seen=self.seen, steps=self.steps)
        if self._gate.ready:
            self._decide()
        learned = self.steps > self._decided_steps  # a swap of what nobody changed would cost every cache
        waits = self._gate.holding or (self._canary is not None and self._canary.trying)
        if learned and not waits and self._since_candidate >= self._publish_every:
            self._since_candidate = 0
            self._gate.hold()
            entered = 0 if self._vocab is None else self._vocab.follow(self._replayed)
            self._log.write("candidate", tokens_entered=entered, seen=self.seen, steps=self.steps)
        if len(self._new) >= self._batch_size:
            batch, self._new = self._new[: self._batch_size], self._new[self._batch_size :]
            self._credit = min(self._credit + self._replay, 4 * self._replay)
            if self._train(pack(batch), new=len(batch)) and not self._once:
                self._sound = batch[-1]
            if self._once:
                self._replayed.remove(batch)
            return_freed_memory()
        elif self._credit > 0:
            self._credit -= 1
            self._train(self._buffer.sample(), new=0)
            if not self._credit:  # it may wait for long now; the next step has to ask for the pages again
                return_freed_memory()
        else:
            return bool(arrivals)
        return True

    def _retained(self, arrivals: Sequence[TensorDictBase]) -> list[TensorDictBase]:
        """Drop what was deleted or is too old, wherever it is kept. Return the arrivals without it."""
        if deletions := self._collector.take_deletions():
            gone, number = is_deleted(deletions), len(arrivals)
            arrivals = [each for each in arrivals if not gone(each)]
            dropped = number - len(arrivals) + self._drop(gone)[1]
            self._log.write("deleted", tenants=len(deletions), trajectories=dropped, steps=self.steps)
        expired = self._drop(self._age_limit.passed)[0] if self._age_limit.due() else []
        expired += [each for each in arrivals if self._age_limit.passed(each)]
        self._notes.dropped("expired", expired)
        return [each for each in arrivals if not self._age_limit.passed(each)]

    def _drop(self, gone: Callable[[TensorDictBase], bool]) -> tuple[list[TensorDictBase], int]:
        """Drop trajectories. Return those that were not learned from, and how many there were in all."""
        held = self._gate.drop(gone)  # held trajectories are in no buffer
        unlearned = held + [each for each in self._new if gone(each)]
        self._new = [each for each in self._new if not gone(each)]
        if self._sound is not None and gone(self._sound):
            self._sound = None
        dropped = len(held) + self._replayed.drop(gone)
        self._credit *= len(self._buffer) > 0  # else there is nothing to replay
        return unlearned, dropped

    def _admit(self, trajectories: list[TensorDictBase]) -> None:
        if trajectories:
            self._buffer.extend(trajectories)
            # What the buffer has let go is not kept waiting here either: arrivals may outrun learning for long.
            new, gone = self._replayed.parted([*self._new, *trajectories])
            self._notes.dropped("buffer_full", gone)
            self._new = [new[turn] for turn in in_turns([engine_of(each) for each in new])]
            self._since_candidate += len(trajectories)

    def _note_rejections(self) -> None:
        """Tell who rejects the newest weights. Once no engine serves them, those before them are served again."""
        for engine, reason in self._publisher.rejected_by(self.version).items():
            if engine not in self._rejecting and len(self._rejecting) < _MAX_TOLD:
                self._rejecting.add(engine)
                self._log.write(
                    "rejected", version=self.version, engine=engine, reason=reason, seen=self.seen, steps=self.steps
                )
        trying = self._canary is not None and self._canary.trying  # against the newest
        if self._replaced is None or trying or not self._publisher.withdraw(self.version):
            return
        self._serving, self._replaced = self._replaced, None
        self._audit.withdrawn(self._serving)
        shutil.rmtree(self._versions / str(self.version), ignore_errors=True)
        self._log.write("withdrawn", version=self.version, seen=self.seen, steps=self.steps)
        self.outputs.write(_STATE, self.save)

    def _train(self, batch: TensorDictBase, *, new: int) -> bool:
        """Take a step, and return whether it was taken."""
        began = time.perf_counter()
        try:
            loss, out = train_step(self._loss, self._optimizers, batch, autocast=self._dtype == torch.bfloat16)
        except FloatingPointError as error:
            if not self._quarantine(batch["request"].tolist(), str(error)):
                self._skip(str(error))
            return False
        self._skipped_in_a_row = 0
        self.steps, self.seen = self.steps + 1, self.seen + new
        self._log.write(
            "train",
            loss=round(loss, 4), objectives={key: rounded(value) for key, value in out.items()}, seen=self.seen,
            steps=self.steps, new=new, seconds=round(time.perf_counter() - began, 3), waiting=len(self._new),
        )  # fmt: skip
        return True

    def _quarantine(self, requests: list[int], reason: str) -> bool:
        """Remove trajectories of a batch for whose sake no step can be taken. Return whether there were any.

        Where not even a trajectory that was learned from before gives a step, the weights are the cause.
        """
        if self._sound is None or not self._has_step(self._sound):
            return False
        found = [each for each in self._replayed.of_requests(requests) if not self._has_step(each)]
        if found:
            self._replayed.remove(found)
            self._new, _ = self._replayed.parted(self._new)
            self._notes.dropped("quarantined", found)
            sources = sorted({engine_of(each) for each in found})
            names = [int(each["request"]) for each in found]
            logger.warning(
                "requests %s of %s are dropped, as no step could be taken with them: %s", names, sources, reason
            )
            self._log.write("quarantined", requests=names, sources=sources, reason=reason, steps=self.steps)
        return bool(found)

    def _has_step(self, trajectory: TensorDictBase) -> bool:
        return has_finite_step(self._loss, self._optimizers, pack([trajectory]), autocast=self._dtype == torch.bfloat16)

    def _skip(self, reason: str) -> None:
        """Leave a step out. After too many in a row, save what was learned before them and raise FloatingPointError."""
        self.skipped += 1
        self._skipped_in_a_row += 1
        self._log.write("step_skipped", reason=reason, steps=self.steps, skipped=self.skipped)
        if self._skipped_in_a_row > self._max_skipped:
            # A step that was finite itself may have led to weights that are not.
            finite = all(bool(weight.isfinite().all()) for weight in self._drafter.state_dict().values())
            written = not finite or self.try_save()
            there = self._states.exists()
            kept = f"the last good training state is in {self._states}" if there else "no good state was saved"
            if not written:
                kept = f"{self.outputs.failures[_STATE]}{f'; an older one is in {self._states}' * there}"
            raise FloatingPointError(
                f"{self._skipped_in_a_row} steps in a row had no finite loss and gradient (the last: {reason}); "
                f"{kept}; lower the learning rate, or set learner.max_skipped higher"
            )

    def _decide(self) -> None:
        began, candidate = time.perf_counter(), self._as_served(self._drafter.published())
        self._decided_steps = self.steps
        decision, released = self._gate.decide(candidate, self._serving)
        canary = self._canary if decision.publish else None
        tried = None if canary is None else canary.begin(candidate, self._serving, self.version)
        if decision.publish and tried is None:
            self._publish(candidate)
        self._log.write(
            "gate", **asdict(decision), version=tried or self.version, seconds=round(time.perf_counter() - began, 3),
            seen=self.seen, steps=self.steps,
        )  # fmt: skip
        self._admit(released)

    def _publish(self, weights: dict[str, Tensor]) -> int:
        # An engine may serve a version from before this learner started; versions only rise.
        self.version = max(self.version + 1, self._publisher.next_version)
        if weights is not self._serving:
            self._replaced, self._serving = self._serving, weights
        self._rejecting.clear()
        self._audit.published(self.version, weights)
        self._publisher.publish(self.version, weights)
        self.try_save()
        self.outputs.write("the version", self._save_version)
        return self.version

    def try_save(self) -> bool:
        """Save the training state. Return False if that failed, which is logged and kept in ``outputs.failures``."""
        return self.outputs.write(_STATE, self.save)

    def _save_version(self) -> None:
        """Keep the drafter that was published last, and the newest before it."""
        if self._keep:
            self._save_drafter(self._versions / str(self.version))
            for folder in sorted(self._versions.glob("[0-9]*"), key=lambda each: int(each.name))[: -self._keep]:
                shutil.rmtree(folder, ignore_errors=True)
        self.outputs.failures.pop("the version", None)

    def _save_drafter(self, folder: Path) -> None:
        if self._drafter.formats:
            save_drafter(with_weights(self._drafter, self._serving, self._dtype), folder)

    def save(self) -> None:
        """Add the training state, with the drafter that was published last, to those on disk.

        Raises:
            OSError: It cannot be written; the earlier ones are left as they were.
        """
        add_state(self._states, self._write_state, self._keep_states)
        self.outputs.failures.pop(_STATE, None)  # a later state makes good for an earlier one
        self._log.write("checkpoint", seen=self.seen, steps=self.steps, version=self.version)

    def _write_state(self, folder: Path) -> None:
        counts = {"seen": self.seen, "steps": self.steps, "decided_steps": self._decided_steps, "version": self.version}
        vocab = {"draft_vocab": self._drafter.draft_vocab}
        progress = {**counts, "draft_vocab": checksum(vocab), "adapters": self._adapters}
        weights = {"serving": self._serving, "replaced": self._replaced or {}, "draft_vocab": vocab}
        save_training_state(folder, self._drafter, self._optimizers, progress, weights)
        self._save_drafter(folder / "drafter")
        if self._save_buffer:
            stream = {key: v for key, v in self.state_dict().items() if key not in _ELSEWHERE}
            torch.save(stream, folder / _STREAM)

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides what it does next: other than a training state, with replay buffer and gate.

        Tensors are its own, to be written before its next step.
        """
        return {
            "drafter": self._drafter.state_dict(),
            "draft_vocab": self._drafter.draft_vocab,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "serving": self._serving,
            "buffer": self._buffer.state_dict(),
            "gate": self._gate.state_dict(),
            "new": self._replayed.places(self._new),
            "objectives": [dict(each.named_buffers(recurse=False)) for each in self._objectives()],
            "random": torch.get_rng_state(),
            "counts": {name: getattr(self, name) for name in _COUNTS},
        }

    def _objectives(self) -> list[Objective]:
        return [each for each in self._loss.modules() if isinstance(each, Objective)]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on exactly where a learner of the same settings was, whose :meth:`state_dict` this is."""
        self._drafter.load_state_dict(state["drafter"])
        self._drafter.draft_vocab = state["draft_vocab"]
        for optimizer, values in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self._serving = state["serving"]
        self._load_stream(state)
        self._audit.published(self.version, self._serving)

    def _load_stream(self, state: Mapping[str, Any]) -> None:
        """Go on in the stream of trajectories where :meth:`state_dict` was taken."""
        self._buffer.load_state_dict(state["buffer"])
        self._gate.load_state_dict(state["gate"])
        new, number = state["new"], len(self._replayed)
        if new and not isinstance(new[0], int):  # a state of an earlier release has copies of the buffer's last
            new = range(max(number - len(new), 0), number)
        self._new = [self._replayed[place] for place in new]
        for objective, values in zip(self._objectives(), state["objectives"], strict=True):
            for name, value in values.items():
                objective.get_buffer(name).copy_(value)
        torch.set_rng_state(state["random"])
        for name, value in state["counts"].items():
            setattr(self, name, value)

    def close(self) -> None:
        """Close the wire."""
        self._notes.close(self.steps, self.version)
        self._collector.shutdown()
        self._publisher.close()

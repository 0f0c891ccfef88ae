"""A learner with both ends of the wire, and trajectories for it to learn from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from learner_loops import HANDSHAKE, PARTS, SHAPE, TARGET, Make, day0
from run_events import events
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver
from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.policies import Eagle3Drafter, TreeShape
from aurora_rl.policies.adapters import add_adapters
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.testing import serve
from aurora_rl.training.engine_canary import EngineCanary, EngineTrialRules
from aurora_rl.training.gate import Gate
from aurora_rl.training.learner import Learner
from aurora_rl.training.moving_vocab import MovingVocab
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.replay import trajectory_buffer


@pytest.fixture(scope="package")
def served() -> list[TensorDict]:
    """Trajectories of one request each, numbered from 0."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(32, (4,), generator=generator) for _ in range(80)]
    return serve(day0(), TARGET, prompts, shape=TreeShape(1), max_new_tokens=24, num_slots=len(prompts))


class Loss:
    """The imitation loss, which notes the requests of each batch and can be told to return something else."""

    def __init__(self, drafter: Eagle3Drafter) -> None:
        self._loss, self._drafter = ImitationLoss(drafter, PARTS.head, steps=3), drafter
        self.batches: list[list[int]] = []
        self.losses: list[float] = []
        self.poison: Callable[[Eagle3Drafter], Tensor] | None = None

    def modules(self) -> Iterator[torch.nn.Module]:
        return self._loss.modules()

    def __call__(self, batch: TensorDict) -> TensorDict:
        self.batches.append(batch["request"].tolist())
        out = self._loss(batch)
        if self.poison is not None:
            out["loss_imitation"] = self.poison(self._drafter)
        self.losses.append(float(out["loss_imitation"].detach()))
        return out


@pytest.fixture
def make(tmp_path: Path, quick_heartbeats: None) -> Iterator[Make]:
    """Makes a learner with both ends of its wire: `learner`, `sink`, `receiver`, and what tests look at."""
    with ExitStack() as stack:

        def build(
            *,
            vocab: Sequence[int] = range(32),
            follows: bool = False,
            dtype: torch.dtype = torch.float32,
            buffer: int = 100,
            gate: int = 4,
            batch_size: int = 2,
            replay: int = 0,
            publish_every: int = 10_000,
            max_skipped: int = 20,
            muon_lr: float = 0.02,
            adam_lr: float = 3e-3,
            engine: Handshake = HANDSHAKE,
            version: int = 0,
            checksum: str | None = None,
            keep: int = 5,
            max_age: float | None = None,
            once: bool = False,
            canary: EngineTrialRules | None = None,
            adapters: tuple[str, ...] = (),
        ) -> SimpleNamespace:
            drafter, log = day0(vocab), MetricsLog(tmp_path / "metrics.jsonl", "learner")
            if adapters:
                add_adapters(drafter, adapters, rank=2)
            collector = ZMQCollector("tcp://127.0.0.1:*", handshake=HANDSHAKE)
            publisher = WeightPublisher("tcp://127.0.0.1:*", handshake=HANDSHAKE)
            sink = TrajectorySink(collector.address, handshake=engine)
            receiver = WeightReceiver(publisher.address, handshake=engine, version=version, checksum=checksum)
            loss = Loss(drafter)
            scratch = copy.deepcopy(drafter).to(dtype).requires_grad_(False)
            optimizers = drafter_optimizers(drafter, muon_lr=muon_lr, adam_lr=adam_lr)
            learner = Learner(
                drafter=drafter,
                loss=loss,  # type: ignore[arg-type]
                optimizers=optimizers,
                buffer=trajectory_buffer(buffer, batch_size),
                collector=collector,
                publisher=publisher,
                gate=Gate(gate, 10.0, SHAPE, scratch),
                log=log,
                serving_dtype=dtype,
                batch_size=batch_size,
                replay=replay,
                publish_every=publish_every,
                max_skipped=max_skipped,
                states=tmp_path / "learner",
                keep=keep,
                max_age=max_age,
                once=once,
                outputs=Outputs(log),
                canary=None if canary is None else EngineCanary(publisher, canary, log),
                vocab=MovingVocab(drafter, PARTS.head, optimizers) if follows else None,
            )
            for close in (sink.close, receiver.close, learner.close):
                stack.callback(close)

            return SimpleNamespace(
                learner=learner,
                drafter=drafter,
                loss=loss,
                sink=sink,
                receiver=receiver,
                publisher=publisher,
                collector=collector,
                events=partial(events, tmp_path),
                states=tmp_path / "learner",
            )

        yield build

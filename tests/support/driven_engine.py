"""An engine of concurrent clients on a small target, and a thread that drives its rounds as the command line does."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from aurora_rl.policies import MedusaDrafter, TargetParts, TreeShape
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.serving.async_engine import AsyncEngine
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows

SLOTS, LENGTH = 2, 512


class ClientRig:
    """An engine, its server, its clients' end, and in place of the sink a list of what a learner would get.

    Attributes:
        learned: Ids of the requests whose trajectories were handed on.
        deleted: Tenants whose data the learner was told to delete.
        connected: Whether there is a learner.
        queued: Trajectories that wait to be sent.
        drops: Trajectories that no learner took, by reason.
        sent: Trajectories handed to a learner.
        log: What the server writes.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        folder: Path,
        *,
        decode: Callable[[list[int]], str],
        draft_vocab: int = 16,
        stop_tokens: tuple[int, ...] = (),
        max_waiting: int = 64,
    ) -> None:
        drafter = MedusaDrafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(draft_vocab))
        self.clients = AsyncEngine(max_waiting=max_waiting)
        decoder = SpeculativeDecoder(
            target,
            drafter,
            self.clients,
            shape=TreeShape(3, lookup=2),
            max_length=LENGTH,
            num_slots=SLOTS,
            stop_tokens=stop_tokens,
            decode=decode,
            on_refused=self.clients.refused,
        )
        self.env = decoder.env
        assert decoder.policy is not None
        self.learned: list[int] = []
        self.deleted: list[str] = []
        self.connected = True
        self.queued = self.sent = 0
        self.drops: Counter[str] = Counter()
        self.log = MetricsLog(folder / "metrics.jsonl", "server")
        self.server = InferenceServer(
            self.env,
            decoder.policy,
            windows=BaselineWindows(0.0, 1),
            log=self.log,
            sink=self,  # type: ignore[arg-type]
            note=self.clients.completed,
        )

    def extend(self, trajectory: Any, tenant: str | None = None, seconds: float | None = None) -> None:
        self.learned.append(int(trajectory["request"]))

    def delete(self, tenant: str) -> int:
        self.deleted.append(tenant)
        return 0


@contextlib.contextmanager
def driven(engine: AsyncEngine, server: InferenceServer) -> Iterator[None]:
    """Serve in a thread while the block runs."""
    engine.attach(server)
    stop = threading.Event()

    def rounds() -> None:
        try:
            while not stop.is_set():
                if not engine.step():
                    engine.wait(0.05)
        except BaseException as error:
            engine.end(f"the engine has ended: {error!r}")
        else:
            engine.end()

    thread = threading.Thread(target=rounds, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(30)
        assert not thread.is_alive()

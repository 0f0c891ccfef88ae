"""The ranks of one model under tensor parallelism: orders of the first, and votes of all.

SGLang's scheduler runs in every one of them, in lockstep. Between two batches the first rank broadcasts the requests
that came, and all take them in. Orders travel with these requests, so that every rank carries them out at the same
place. A rank takes part in what an order says whatever it finds wrong with it; what it found, it says in a vote.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aurora_rl.envs.sglang import ENGINE
from aurora_rl.remote_engines import address_variable

TIMEOUT_S = 120.0
"""Seconds within which every rank comes to what an order says."""
_BALLOT = 2048  # bytes
_MAX_TEXT = 400  # characters of a text in a ballot, each of which may take four bytes


class EngineRanksLostError(ConnectionError):
    """Other ranks did not come to what an order says."""


@dataclass(frozen=True, slots=True)
class Order:
    """The first rank's order to all ranks, with numbers that it needs. SGLang pickles it for its other processes."""

    kind: str
    fields: dict[str, int] = field(default_factory=dict)


class EngineRanks:
    """The ranks of a server, as one of them sees them.

    Args:
        group: PyTorch's process group of these ranks for tensors on the CPU; None if there is one rank.

    Attributes:
        rank: Number of this process; 0 receives SGLang's requests.
        size: Number of processes.

    Example:
        >>> EngineRanks().vote(fault="")
        [{'fault': ''}]
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = group
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))

    def broadcast(self, tensor: Tensor) -> None:
        """Put the first rank's values into the tensor of each, in place: on the CPU, of one shape and dtype on all."""
        if self._group is not None:
            source = dist.get_global_rank(self._group, 0)
            self._wait(dist.broadcast(tensor, source, self._group, async_op=True))

    def vote(self, **ballot: Any) -> list[dict[str, Any]]:
        """Return what each rank said, in their order: small JSON values. Long texts are cut."""
        if self._group is None:
            return [ballot]
        short = {name: value[:_MAX_TEXT] if isinstance(value, str) else value for name, value in ballot.items()}
        own = torch.frombuffer(
            bytearray(json.dumps(short, ensure_ascii=False).encode().ljust(_BALLOT)), dtype=torch.uint8
        )
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._wait(dist.all_gather(found, own, self._group, async_op=True))
        return [json.loads(bytes(each.numpy())) for each in found]

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensors of all ranks on the first rank, in their order; nothing on others.

        They have one shape and dtype on all ranks, and come to the CPU; with one rank it is ``tensor`` itself.
        """
        if self._group is None:
            return [tensor]
        own, target = tensor.detach().cpu().contiguous(), dist.get_global_rank(self._group, 0)
        found = [torch.empty_like(own) for _ in range(self.size)] if self.rank == 0 else None
        self._wait(dist.gather(own, found, target, self._group, async_op=True))
        return found or []

    def fault_of(self, ballots: list[dict[str, Any]]) -> str:
        """Return the first fault that a rank has voted, with its number; empty if none has."""
        faults = [(rank, ballot["fault"]) for rank, ballot in enumerate(ballots) if ballot["fault"]]
        if not faults or self.size == 1:
            return faults[0][1] if faults else ""
        return f"rank {faults[0][0]} of {self.size}: {faults[0][1]}"

    def register(self, missing: list[str]) -> None:
        """Let the first rank know that the plugin runs here, and the hooks that are not in force."""
        if self.size > 1:
            _store().set(f"aurora_rl/{self.rank}", json.dumps(missing))

    def unfit(self) -> str:
        """Return why the plugin does not run on every rank; empty if it does. Waits for nobody."""
        for rank in range(self.size if self.size > 1 else 0):
            if not _store().check([f"aurora_rl/{rank}"]):
                return (
                    f"the plugin does not run on rank {rank} of {self.size}; start {ENGINE} with "
                    f"{address_variable(ENGINE)} in its environment, and aurora-rl installed, on every host"
                )
            if missing := json.loads(_store().get(f"aurora_rl/{rank}")):
                return f"hooks are not in force on rank {rank} of {self.size}: {', '.join(missing)}; its log says why"
        return ""

    def _wait(self, work: dist.Work | None) -> None:
        assert work is not None, "this process is of the group"
        try:
            work.wait(timedelta(seconds=TIMEOUT_S))
        except RuntimeError as error:
            raise EngineRanksLostError(
                f"rank {self.rank} of {self.size}: the others did not come within {TIMEOUT_S:.0f} s, or one has ended "
                f"({str(error).splitlines()[0]}); restart SGLang"
            ) from error


def _store() -> dist.Store:
    """Return the store by which SGLang's processes found each other."""
    return dist.distributed_c10d._get_default_store()

"""Processes as torchrun starts them: each knows its rank, and where they meet."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from forked_commands import ForkedProcess, Forks
from torch.distributed import TCPStore


class Ranks(list[ForkedProcess]):
    """Processes of one group, and the store by which they find each other, as `torchrun` holds it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        # The store chooses its port. One that was found free beforehand may be taken by the time that a rank opens it.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.place = {
            "TORCHELASTIC_USE_AGENT_STORE": "True", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip


def start_ranks(forks: Forks, folder: Path, words: Sequence[str], size: int = 2) -> Ranks:
    """Start ``size`` processes with the same words, whose outputs go to ``rank<number>`` in a folder."""
    ranks = Ranks(size)
    with ExitStack() as files:
        for rank in range(size):
            output = files.enter_context((folder / f"rank{rank}").open("wb"))
            variables = os.environ | ranks.place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(forks.start(words, output, output, env=variables))
    return ranks


def ended(processes: Sequence[ForkedProcess], folder: Path, seconds: float = 60.0) -> tuple[list[int], list[str]]:
    """Return the exit status and the output of each process; what still runs after the time is killed."""
    for process in processes:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    statuses = [process.wait(seconds) for process in processes]
    return statuses, [(folder / f"rank{rank}").read_text() for rank in range(len(processes))]

"""Processes as torchrun starts them: each knows its rank, and where they meet."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from forked_commands import ForkedProcess, Forks


def start_ranks(forks: Forks, folder: Path, words: Sequence[str], size: int = 2) -> list[ForkedProcess]:
    """Start ``size`` processes with the same words, whose outputs go to ``rank<number>`` in a folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    started = []
    with ExitStack() as files:
        for rank in range(size):
            output = files.enter_context((folder / f"rank{rank}").open("wb"))
            variables = os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            started.append(forks.start(words, output, output, env=variables))
    return started


def ended(processes: Sequence[ForkedProcess], folder: Path, seconds: float = 60.0) -> tuple[list[int], list[str]]:
    """Return the exit status and the output of each process; what still runs after the time is killed."""
    for process in processes:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
    statuses = [process.wait(seconds) for process in processes]
    return statuses, [(folder / f"rank{rank}").read_text() for rank in range(len(processes))]

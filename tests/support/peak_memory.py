"""How much memory of the system a function takes at most."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from aurora_rl.memory import return_freed_memory


def peak_memory(function: Callable[[], Any]) -> float:
    """Call a function and return the megabytes by which it raised the process's resident memory at most; Linux only."""
    return_freed_memory(collect=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    function()
    return _resident("VmHWM") - before


def _resident(entry: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(entry)) / 1024

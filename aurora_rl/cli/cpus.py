"""Number of CPUs that this process may use, often fewer than the machine has."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> int:
    """Return the CPUs that the affinity mask and the cgroups' quotas leave to this process, at least 1.

    A fraction of a CPU is rounded down: a thread too many is throttled together with the others.

    Args:
        root: Folder that holds ``proc`` and ``sys``.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(int(min([allowed, *_quotas(root)])), 1)


def _quotas(root: Path) -> Iterator[float]:
    """Yield the CPUs that each cgroup of the process may use, its own and every one above it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or no cgroups
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 2 names no controllers; version 1 is mounted by the name of its controller. A container often sees
        # its own cgroup as the root while this path is the host's, so every folder above it is looked at as well.
        base = mount / "cpu" if controllers else mount
        relative = Path(path.lstrip("/"))
        for folder in (relative, *relative.parents):
            quota = _read(base / folder / "cpu.max") or [
                *_read(base / folder / "cpu.cfs_quota_us"),
                *_read(base / folder / "cpu.cfs_period_us"),
            ]
            if len(quota) == 2 and all(word.isdecimal() and int(word) for word in quota):  # others are "max" and -1
                yield int(quota[0]) / int(quota[1])


def _read(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []

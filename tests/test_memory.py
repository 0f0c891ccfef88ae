"""Memory that was freed goes back to the system; what is imported is exempt from the search for garbage."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from aurora_rl import memory


def resident() -> int:
    """Anonymous memory of this process, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) // 1000


@pytest.mark.skipif(memory._trim is None, reason="the C library is not glibc")
def test_freed_tensors_next_to_one_that_lives_go_back_to_the_system() -> None:
    tensors = [torch.ones(25_000) for _ in range(1000)]  # 100 kB each, which glibc takes from its heap
    last = tensors[-1]
    tensors.clear()
    before = resident()
    memory.return_freed_memory()
    assert before - resident() > 60
    assert last.sum() == 25_000


def test_a_process_that_has_torch_already_searches_its_objects_as_before() -> None:
    # tests/cli/test_main.py has a process that has not.
    before = gc.get_freeze_count()
    with memory.importing():
        assert gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == before

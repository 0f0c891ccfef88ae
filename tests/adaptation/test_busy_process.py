"""A process next to a measurement: it works only where it may, and is gone afterwards."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from aurora_rl.adaptation.busy_process import BusyProcess


def append(path: Path) -> None:
    with path.open("a") as file:
        file.write(".")
    time.sleep(0.005)


def appending(path: Path) -> Callable[[], object]:
    return partial(append, path)


def broken() -> Callable[[], object]:
    raise ValueError("it cannot begin")


def test_it_works_in_the_block_alone(tmp_path: Path) -> None:
    path = tmp_path / "dots"
    with BusyProcess(appending, path) as process:
        size = path.stat().st_size
        time.sleep(0.2)
        assert path.stat().st_size == size >= 1
        with process.running():
            deadline = time.monotonic() + 20
            while path.stat().st_size < size + 5:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        time.sleep(0.05)  # the signal is on its way
        size = path.stat().st_size
        time.sleep(0.2)
        assert path.stat().st_size == size
    assert not process._process.is_alive()


def test_one_that_cannot_begin_is_told() -> None:
    with pytest.raises(RuntimeError, match="ended before it was ready"), BusyProcess(broken):
        pass

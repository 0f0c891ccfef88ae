"""The scripts of benchmarks/, imported."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("*.py"))


def imported(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import a script as running it would; it and its neighbours are forgotten after the test."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for each in SCRIPTS:
        monkeypatch.setitem(sys.modules, each, None)  # so that the end of the test forgets what is imported now
        del sys.modules[each]
    module = importlib.import_module(name)
    assert module.__file__ is not None and Path(module.__file__).parent == BENCHMARKS
    return module

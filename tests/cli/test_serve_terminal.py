"""What `aurora-rl serve` and `flywheel` show at a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from aurora_rl.cli import main as cli
from aurora_rl.cli import serve


def test_a_terminal_keeps_the_last_state(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(serve, "plain_console", lambda: Console(file=out, force_terminal=True, width=100, markup=False))
    assert cli.main(["flywheel", "learner.spawn=false", *arguments, "drafter.adaptive=false"]) == 0
    _, _, last = out.getvalue().rpartition("│ 6/6 ")
    assert "speedup" in last and "\x1b[2K" not in last  # nothing of it is erased
    assert "engine …" in out.getvalue()

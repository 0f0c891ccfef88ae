"""What a long command shows of its progress."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from aurora_rl.cli import progress


def test_lines_say_what_is_done_and_how_long_the_rest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with progress.watch(Console(file=out, width=200), "learning", 10, 2) as shown:
        now = 110.0
        shown.tell(4)
        assert out.getvalue() == ""  # a line every 15 s
        now = 120.0
        shown.tell(6, "loss 1.500")
        now = 125.0
        shown.tell(7)
    assert out.getvalue() == "learning 6/10, loss 1.500, 20 s left\n"


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    out = io.StringIO()
    with progress.watch(Console(file=out, width=200, force_terminal=True), "recording", 10, 0) as shown:
        shown.tell(5, "half")
    assert "recording half" in out.getvalue() and "5/10" in out.getvalue() and "s left" not in out.getvalue()

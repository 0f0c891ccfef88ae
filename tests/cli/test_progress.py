"""What a long command shows of its progress."""

from __future__ import annotations

import io
import re

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


def test_a_start_says_what_each_step_took(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress.timed_steps(Console(file=out, width=200)) as step:
        step("model")
        now = 101.26
        step("engine")
        assert out.getvalue() == "model 1.3 s\n"
        now = 104.0
    assert out.getvalue() == "model 1.3 s\nengine 2.7 s\n"


def test_a_terminal_shows_the_step_that_runs() -> None:
    out = io.StringIO()
    with progress.timed_steps(Console(file=out, width=200, force_terminal=True)) as step:
        step("model")
        assert out.getvalue().rstrip().endswith("model …")
        step("engine")
        assert out.getvalue().rstrip().endswith("model 0.0 s · engine …")
    assert re.sub("\x1b\\[[0-9;?]*[a-zA-Z]", "", out.getvalue()).endswith("model 0.0 s · engine 0.0 s\n")


def test_a_start_that_fails_tells_no_times() -> None:
    out = io.StringIO()
    with pytest.raises(ValueError, match="no such model"), progress.timed_steps(Console(file=out)) as step:
        step("model")
        raise ValueError("no such model")
    assert out.getvalue() == ""

"""A short soak of `aurora-rl serve`: strangers leave nothing behind, and others are answered as before."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from benchmark_scripts import imported

pytestmark = pytest.mark.faults


@pytest.mark.stress
def test_strangers_leave_nothing_behind(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    soak = imported("soak", monkeypatch)
    seen: list[object] = []
    monkeypatch.setattr(soak, "write_result", lambda script, options, figures: seen.append(figures))
    words = ["--model", str(tiny_folder), "--minutes", "0.1", "--limit", "4", "--max-new-tokens", "16"]
    pairs = ["engine.max_length=512", "drafter.vocab_size=64", "drafter.adaptive=false"]
    monkeypatch.setattr(sys, "argv", ["soak.py", *words, "--device", "cpu", *pairs])
    with pytest.raises(SystemExit) as end:
        soak.main()
    (figures,) = seen
    assert isinstance(figures, dict)
    assert end.value.code == 0, figures["failures"]
    assert figures["answers"]["equal"] > 10
    assert all(
        figures["strangers"][name] for name in ("vanish", "leave_early", "send_junk", "send_too_much", "ask_badly")
    )

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from aurora_rl.telemetry.rates import Round, Rounds
from aurora_rl.telemetry.report import draw_report, summary_table, write_summary
from aurora_rl.telemetry.stats import Stats

EMPTY_SUMMARY = Stats().summary()
SUMMARY = {
    "requests": 40,
    "failed": 1,
    "swaps": 2,
    "swap_ms": {"p50": 1.23456789, "max": 2.0},
    "acceptance_length": {"first": 1.0, "last": 1.9},
    "domains": {
        "": {"requests": 1, "tokens": 9, "acceptance_length": None},
        "chat": {"requests": 39, "tokens": 1000, "acceptance_length": 1.5},
    },
    "tokens_per_second": {"baseline": 100.0, "speculative": 150.0},
    "speedup": 1.5,
    "baseline_rounds": 320,
    "dropped_trajectories": 0,
    "drafter_faults": 0,
    "duration_s": 61.5,
    "versions_served": [0, 1, 2],
}


def render(summary: dict) -> str:
    console = Console(width=100, record=True, file=open("/dev/null", "w"))
    console.print(summary_table(summary))
    console.file.close()
    return console.export_text()


def test_the_summary_has_the_promised_keys_and_rounded_numbers(tmp_path: Path) -> None:
    write_summary(tmp_path, SUMMARY)
    read = json.loads((tmp_path / "summary.json").read_text())
    assert read == {**SUMMARY, "swap_ms": {"p50": 1.2346, "max": 2.0}}
    assert list(read) == list(EMPTY_SUMMARY)
    assert {k: list(v) for k, v in EMPTY_SUMMARY.items() if isinstance(v, dict)} == {
        "swap_ms": ["p50", "max"],
        "acceptance_length": ["first", "last"],
        "domains": [],
        "tokens_per_second": ["baseline", "speculative"],
    }


def test_domains_have_a_row_where_there_are_any() -> None:
    assert "acceptance length by domain" in render(SUMMARY) and "none – · chat 1.50" in render(SUMMARY)
    assert "by domain" not in render(EMPTY_SUMMARY)


def test_what_was_not_measured_is_null_and_a_dash(tmp_path: Path) -> None:
    write_summary(tmp_path, EMPTY_SUMMARY)
    assert json.loads((tmp_path / "summary.json").read_text()) == EMPTY_SUMMARY
    text = render(EMPTY_SUMMARY)
    assert "0 (0 failed)" in text
    assert "– → –" in text


def test_the_table_shows_the_figures() -> None:
    text = render(SUMMARY)
    for shown in ("40 (1 failed)", "1.00 → 1.90", "100.0 · 150.0", "1.50", "2 (p50 1.2 ms, max 2.0 ms)", "62 s"):
        assert shown in text


@pytest.mark.parametrize("requests", [0, 1, 60])
def test_the_report_is_a_picture_whatever_was_measured(tmp_path: Path, requests: int) -> None:
    rounds = [Round(r % 3 > 0, 1, 2, 0.125, r // 3) for r in range(3 * requests)]  # sums of eighths are exact
    draw_report(tmp_path / "report.png", [(6, 3)] * requests, rounds, [0, requests // 2])
    picture = (tmp_path / "report.png").read_bytes()
    sums = Rounds()
    for each in rounds:
        sums.append(each)
    draw_report(tmp_path / "sums.png", [(6, 3)] * requests, sums, [0, requests // 2])
    assert (tmp_path / "sums.png").read_bytes() == picture
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 5000


def test_half_a_picture_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(self: Figure, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", cut)
    with pytest.raises(OSError, match="No space left"):
        draw_report(tmp_path / "report.png", [(6, 3)], [], [])
    assert list(tmp_path.iterdir()) == []


def test_requests_without_speculative_rounds_can_be_drawn(tmp_path: Path) -> None:
    draw_report(tmp_path / "report.png", [(0, 0)] * 30, [Round(False, 1, 1, 0.1, 0)], [])
    assert (tmp_path / "report.png").exists()

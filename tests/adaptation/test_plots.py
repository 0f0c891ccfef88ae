"""The plots show the figures that the results hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from aurora_rl.adaptation.plots import draw

RUNS = [
    # Three requests a phase, and a window of two: points at requests 2 to 6.
    {"arm": "lookup", "learns": False, "curve": [1.0] * 5, "phases": [{"level": 1.0}, {"level": 1.0}]},
    {"arm": "scratch", "learns": True, "curve": [1.0, 1.5, 9.0, 1.0, 2.0], "phases": [{"level": 1.5}, {"level": 2.0}]},
    {"arm": "scratch", "learns": True, "curve": [1.0, 2.5, 9.0, 2.0, 2.0], "phases": [{"level": 2.5}, {"level": 2.0}]},
]
RESULTS: dict[str, Any] = {
    "window": 2,
    "arms": ["lookup", "scratch"],
    "phases": [{"name": "code", "first": 0, "end": 3}, {"name": "sql", "first": 3, "end": 6}],
    "runs": RUNS,
    "live": [
        {"phase": 1, "slots": 1, "arm": "scratch", "speedup": 1.5, "speedups": [1.4, 1.5, 1.7]},
        {"phase": 1, "slots": 1, "arm": "plain", "speedup": 1.0, "speedups": [1.0]},
    ],
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[float], list[float]]]:
    lines: list[tuple[list[float], list[float]]] = []
    plot = Axes.plot

    def noted(self: Axes, x: Any, y: Any, **settings: Any) -> Any:
        lines.append((list(x), list(y)))
        return plot(self, x, y, **settings)

    monkeypatch.setattr(Axes, "plot", noted)
    return lines


def test_curves_are_means_over_seeds_and_recovery_begins_at_the_shift(
    drawn: list[tuple[list[float], list[float]]], tmp_path: Path
) -> None:
    draw(RESULTS, tmp_path)
    lookup, scratch, recovery = drawn
    assert lookup == ([2, 3, 4, 5, 6], [1.0] * 5)
    assert scratch == ([2, 3, 4, 5, 6], [1.0, 2.0, 9.0, 1.5, 2.0])
    # The window across the shift is left out, and the level is the phase's own.
    assert recovery == ([2, 3], [0.75, 1.0])
    assert {path.name for path in tmp_path.iterdir()} == {"acceptance.png", "recovery.png", "speedup.png"}


def test_one_phase_without_speed_has_one_plot(tmp_path: Path) -> None:
    draw({**RESULTS, "phases": [{"name": "code", "first": 0, "end": 6}], "live": []}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["acceptance.png"]

"""Plots of a scenario's results: acceptance, the way back after each shift, and speedup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_rl.adaptation.metrics import REGAINED

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw(results: Mapping[str, Any], folder: Path) -> None:
    """Draw acceptance over the requests; with shifts, the way back after each; and speedup, where it was measured."""
    from matplotlib.figure import Figure

    shifts = len(results["phases"]) - 1
    for name, plot, size in (
        ("acceptance", _draw_acceptance, (9.0, 4.5)),
        ("recovery", _draw_recovery, (3.2 * shifts, 3.2)),
        ("speedup", _draw_speedup, (9.0, 3.5)),
    ):
        if (name != "recovery" or shifts) and (name != "speedup" or results["live"]):
            figure = Figure(figsize=size, layout="constrained")
            plot(figure, results)
            figure.savefig(folder / f"{name}.png", dpi=120)


def _draw_acceptance(figure: Figure, results: Mapping[str, Any]) -> None:
    """Draw the acceptance length over the requests, with a line at each shift; bands are the range over seeds."""
    axis, window = figure.subplots(), results["window"]
    for number, arm in enumerate(results["arms"]):
        curves = [run["curve"] for run in results["runs"] if run["arm"] == arm]
        if curves:
            _band(axis, range(window, window + len(curves[0])), curves, number, arm)
    top = axis.get_ylim()[1]
    for phase in results["phases"]:
        if phase["first"]:
            axis.axvline(phase["first"], color="grey", linewidth=0.8, linestyle="--")
        axis.text(phase["first"] + 2, top, phase["name"], va="top", fontsize=8, color="grey")
    axis.set_xlabel("requests served")
    axis.set_ylabel(f"acceptance length, last {window} requests")
    axis.legend(fontsize=8, loc="lower right")


def _draw_recovery(figure: Figure, results: Mapping[str, Any]) -> None:
    """Draw, of each phase after a shift, the acceptance length of the requests since then over the phase's level."""
    shifts, window = list(enumerate(results["phases"]))[1:], results["window"]
    axes = figure.subplots(1, len(shifts), sharey=True, squeeze=False)
    for axis, (place, phase) in zip(axes[0], shifts, strict=True):
        for number, arm in enumerate(results["arms"]):
            runs = [run for run in results["runs"] if run["arm"] == arm and run["learns"]]
            # Point `n` of a curve is of the window that ends with request `n + window`.
            part = slice(phase["first"], phase["end"] - window + 1)
            parts = [[value / run["phases"][place]["level"] for value in run["curve"][part]] for run in runs]
            if parts and parts[0]:
                _band(axis, range(window, window + len(parts[0])), parts, number, arm)
        axis.axhline(REGAINED, color="grey", linewidth=0.8, linestyle="--")
        axis.set_title(phase["name"], fontsize=9)
        axis.set_xlabel("requests since the shift")
    axes[0][0].set_ylabel(f"share of the phase's level, last {window}")
    axes[0][-1].legend(fontsize=8, loc="lower right")


def _draw_speedup(figure: Figure, results: Mapping[str, Any]) -> None:
    """Draw the speedup over plain decoding at the end of each phase; bars are the range over turns."""
    axis = figure.subplots()
    cells = sorted({(row["phase"], row["slots"]) for row in results["live"]})
    arms = [arm for arm in results["arms"] if any(row["arm"] == arm for row in results["live"])]
    for number, arm in enumerate(results["arms"]):
        rows = {(row["phase"], row["slots"]): row for row in results["live"] if row["arm"] == arm}
        places = [place for place, cell in enumerate(cells) if cell in rows]
        if places:
            found = [rows[cells[place]] for place in places]
            shifted = [place + 0.12 * (arms.index(arm) - (len(arms) - 1) / 2) for place in places]
            middle = [row["speedup"] for row in found]
            ends = [
                [row["speedup"] - row["speedups"][0] for row in found],
                [row["speedups"][-1] - row["speedup"] for row in found],
            ]
            axis.errorbar(shifted, middle, ends, fmt="o", color=f"C{number}", label=arm, capsize=3)
    axis.axhline(1, color="grey", linewidth=0.8, linestyle="--")
    names = [
        f"{results['phases'][phase]['name']}, {slots} {'slots' if slots > 1 else 'slot'}" for phase, slots in cells
    ]
    axis.set_xticks(range(len(cells)), names, fontsize=8)
    axis.set_ylabel("speedup over plain decoding")
    axis.legend(fontsize=8)


def _band(axis: Any, places: Sequence[int], curves: Sequence[Sequence[float]], number: int, label: str) -> None:
    """Draw the mean of curves, and their range."""
    columns = list(zip(*curves, strict=True))
    axis.plot(places, [sum(column) / len(column) for column in columns], color=f"C{number}", label=label)
    axis.fill_between(
        places, [min(column) for column in columns], [max(column) for column in columns], color=f"C{number}", alpha=0.2
    )

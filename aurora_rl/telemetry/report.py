"""Results of a run: summary.json, report.png and the final table."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from aurora_rl.telemetry.history import DRAFTED, DomainFigures, Point, RunHistory, shares
from aurora_rl.telemetry.rates import MIN_BASELINE_ROUNDS, Rates

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def write_summary(run_dir: str | os.PathLike[str], summary: dict[str, Any]) -> None:
    """Write ``summary.json``, numbers rounded to what the measurement carries."""

    def tidy(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 4)
        return {k: tidy(v) for k, v in value.items()} if isinstance(value, dict) else value

    (Path(run_dir) / "summary.json").write_text(json.dumps(tidy(summary), indent=2) + "\n")


def show(value: float | None, digits: int = 2) -> str:
    """Return a figure as text; a dash stands for what was not measured."""
    return "–" if value is None else f"{value:.{digits}f}"


def show_speedup(measured: Rates) -> str:
    """Return a speedup as text, "too short" where too few plain rounds were measured for one."""
    return "too short" if measured.too_short else show(measured.speedup)


def summary_table(summary: dict[str, Any]) -> Table:
    """Lay out the final table."""
    table = Table(title="run", show_header=False)
    table.add_column(style="bold")
    table.add_column()

    length, speed, swap = summary["acceptance_length"], summary["tokens_per_second"], summary["swap_ms"]
    requests, clients = summary["requests"], summary["client_requests"]
    asked = f", {clients} of clients" if 0 < clients < requests else ""
    table.add_row("requests", f"{requests} ({summary['failed']} failed{asked})")
    table.add_row("acceptance length, first → last tenth", f"{show(length['first'])} → {show(length['last'])}")
    if domains := summary["domains"]:
        lengths = (f"{name or 'none'} {show(figures['acceptance_length'])}" for name, figures in domains.items())
        table.add_row("acceptance length by domain", " · ".join(lengths))
    table.add_row("tokens/s plain · speculative", f"{show(speed['baseline'], 1)} · {show(speed['speculative'], 1)}")
    measured = Rates(speed["baseline"], speed["speculative"], summary["baseline_rounds"])
    table.add_row("speedup, last quarter", show_speedup(measured))
    table.add_row("swaps", f"{summary['swaps']} (p50 {show(swap['p50'], 1)} ms, max {show(swap['max'], 1)} ms)")
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary["dropped_by_reason"].items())
    table.add_row("dropped trajectories", f"{summary['dropped_trajectories']}{f' ({reasons})' if reasons else ''}")
    if summary["drafter_faults"]:
        table.add_row("served without the drafter, for a fault", str(summary["drafter_faults"]))
    table.add_row("duration", f"{summary['duration_s']:.0f} s")
    return table


# ---- report.png -------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart.
_SERVED, _GATE, _SPEED, _SWAP = "#0072b2", "#cc79a7", "#009e73", "#e69f00"
_BANDS = {"tree": "#0072b2", "chain": "#56b4e9", "ngrams": "#009e73", "plain": "#bbbbbb", "baseline": "#f0e442"}
_MAX_BARS, _MAX_STEPS, _MAX_DOTS = 8, 60, 120


def draw_report(path: str | os.PathLike[str], history: RunHistory) -> None:
    """Draw a run over its requests: acceptance length, speedup, what was drafted, and figures by domain.

    Swaps are vertical lines, and dashed lines say where something new begins. A speedup that was measured too shortly
    is a gap. Tokens per second stand in its place where nothing decoded plainly. The file is a PNG.
    """
    from matplotlib.figure import Figure

    points, domains = history.points, _largest_domains(history)
    heights = {"acceptance": 3.0}
    if any(point.rates.baseline_rounds or point.rates.speculative is not None for point in points):
        heights["speed"] = 2.3
    if any(point.drafted for point in points):
        heights["drafted"] = 1.3
    if domains:
        heights["domains"] = 0.4 + 0.22 * len(domains)
    figure = Figure(figsize=(9, 1.0 + sum(heights.values())), layout="constrained")
    axes = figure.subplot_mosaic([[name] for name in heights], height_ratios=list(heights.values()))
    over_requests = [axis for name, axis in axes.items() if name != "domains"]
    for axis in over_requests:
        axis.set_xlim(0, 1.01 * max(history.requests, 1))
        axis.locator_params("x", integer=True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelbottom=axis is over_requests[-1])
        if axis is not axes.get("drafted"):
            for swap in history.swaps:
                axis.axvline(swap.requests, color=_SWAP, alpha=0.5, linewidth=0.8)
    over_requests[-1].set_xlabel("completed requests")
    _draw_acceptance(axes["acceptance"], history)
    if "speed" in axes:
        _draw_speed(axes["speed"], points)
    _draw_marks(over_requests, history)
    if "drafted" in axes:
        _draw_drafted(axes["drafted"], points)
    if domains:
        _draw_domains(axes["domains"], domains)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about characters of domain names that the font lacks
            figure.savefig(path, dpi=120)
    except OSError:
        Path(path).unlink(missing_ok=True)  # half a picture
        raise


def _course(axis: Axes, points: list[Point], values: Sequence[float | None], **style: Any) -> None:
    """Draw a figure of each point, with gaps where it is None, and with dots where there are few."""
    at, shown = [point.requests for point in points], [math.nan if value is None else value for value in values]
    axis.plot(at, shown, ".-" if len(points) <= _MAX_DOTS else "-", markersize=4, **style)


def _legend(axis: Axes) -> None:
    """Put the legend above the axes, where it hides nothing."""
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=5, frameon=False, fontsize=8, borderaxespad=0.2)


def _draw_acceptance(axis: Axes, history: RunHistory) -> None:
    points, gates = history.points, history.gates
    served = [point.acceptance for point in points]
    _course(axis, points, served, color=_SERVED, label="served, last tenth of the requests")
    break_even = [point.rates.break_even for point in points]
    if any(length is not None for length in break_even):
        _course(axis, points, break_even, color="grey", linewidth=0.9, label="break-even, last quarter")
    if gates:
        axis.plot(
            [gate.requests for gate in gates], [gate.serving for gate in gates], "D", color=_GATE, markersize=4,
            label="gate's replay",
        )  # fmt: skip
    if history.swaps:
        axis.plot([], [], color=_SWAP, alpha=0.5, linewidth=0.8, label="weights swapped")
    axis.set_ylabel("acceptance length\n(tokens per round)")
    _legend(axis)


def _draw_speed(axis: Axes, points: list[Point]) -> None:
    if not any(point.rates.baseline_rounds for point in points):  # nothing decoded plainly to compare with
        _course(axis, points, [point.rates.speculative for point in points], color=_SPEED)
        axis.set_ylabel("tokens per second")
        return
    axis.set_ylabel("speedup\n(speculative / plain)")
    axis.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    speedups = [point.rates.speedup for point in points]
    _course(axis, points, speedups, color=_SPEED, label="last quarter of the requests")
    # The longest stretch without a speedup has room to say why.
    short: list[tuple[int, Point]] = []
    stretch: list[tuple[int, Point]] = []
    for before, point in zip([0, *(point.requests for point in points)], points, strict=False):
        stretch = [*stretch, (before, point)] if point.rates.speedup is None else []
        short = max(short, stretch, key=len)
    if short:
        first, last = short[0][0], short[-1][1]
        text = "too short" if last.rates.too_short else "not measured"
        if last.rates.too_short and last is points[-1]:
            text += f"\n{last.rates.baseline_rounds} of {MIN_BASELINE_ROUNDS} plain rounds"
        axis.axvspan(first, last.requests, color="grey", alpha=0.12, linewidth=0)
        axis.text(
            (first + last.requests) / 2, 0.5, text, fontsize=8, color="dimgrey", ha="center", va="center",
            transform=axis.get_xaxis_transform(), clip_on=True,
        )  # fmt: skip
    _legend(axis)


def _draw_marks(axes: list[Axes], history: RunHistory) -> None:
    """Draw where something new begins: what was marked, and domains that the first twentieth did not have."""
    late = [
        (figures.first, f"domain {_short(name)}" if name else "requests without a domain")
        for name, figures in _largest_domains(history)
    ]
    marks = sorted([*history.marks, *(mark for mark in late if mark[0] > history.requests / 20)])
    for level, (at, text) in enumerate(marks):
        if at >= history.requests:
            break  # the run ended before
        for axis in axes:
            axis.axvline(at, color="black", linestyle="--", linewidth=0.9)
        side, align = (-3, "right") if at > 0.7 * history.requests else (3, "left")
        axes[0].annotate(
            text, (at, 1), (side, -3 - 10 * (level % 4)), xycoords=axes[0].get_xaxis_transform(),
            textcoords="offset points", fontsize=8, ha=align, va="top",
        )  # fmt: skip


def _draw_drafted(axis: Axes, points: list[Point]) -> None:
    count = min(len(points), _MAX_STEPS)
    parts = [points[i * len(points) // count : (i + 1) * len(points) // count] for i in range(count)]
    drafted = [shares(sum((point.drafted for point in part), Counter())) for part in parts]
    names = [name for name in DRAFTED if any(name in shown for shown in drafted)]
    # A point counts the rounds since the point before it, hence steps that end at their last point.
    at = [0, *(part[-1].requests for part in parts)]
    bands = [[shown.get(name, 0.0) for shown in [drafted[0], *drafted]] for name in names]
    labels, colors = [DRAFTED[name] for name in names], [_BANDS[name] for name in names]
    axis.stackplot(at, bands, labels=labels, colors=colors, step="pre", linewidth=0)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])
    axis.set_ylabel("rounds that\ndrafted")
    _legend(axis)


def _largest_domains(history: RunHistory) -> list[tuple[str, DomainFigures]]:
    """Return the domains with the most requests, by name; none where requests have no domain."""
    if not any(history.domains):
        return []
    largest = sorted(history.domains.items(), key=lambda each: -each[1].requests)[:_MAX_BARS]
    return sorted(largest, reverse=True)  # from the bottom up


def _draw_domains(axis: Axes, domains: list[tuple[str, DomainFigures]]) -> None:
    lengths = [figures.acceptance or 0.0 for _, figures in domains]
    axis.barh([_short(name) or "none" for name, _ in domains], lengths, color=_SERVED, alpha=0.6)
    for row, (_, figures) in enumerate(domains):
        text = f" {show(figures.acceptance)} · {figures.requests:,} requests · {figures.tokens:,} tokens"
        axis.text(lengths[row], row, text, fontsize=8, va="center")
    axis.set_xlim(0, 1.6 * max(*lengths, 1.0))
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("acceptance length by domain, whole run")


def _short(name: str) -> str:
    """Return the name of a domain for a picture, in which a dollar sign would begin a formula."""
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")

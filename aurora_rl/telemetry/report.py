"""Results of a run: summary.json, report.png and the final table."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from aurora_rl.telemetry.rates import Rates, Round, Rounds, rates


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
    table.add_row("requests", f"{summary['requests']} ({summary['failed']} failed)")
    table.add_row("acceptance length, first → last tenth", f"{show(length['first'])} → {show(length['last'])}")
    if domains := summary["domains"]:
        lengths = (f"{name or 'none'} {show(figures['acceptance_length'])}" for name, figures in domains.items())
        table.add_row("acceptance length by domain", " · ".join(lengths))
    table.add_row("tokens/s plain · speculative", f"{show(speed['baseline'], 1)} · {show(speed['speculative'], 1)}")
    measured = Rates(speed["baseline"], speed["speculative"], summary["baseline_rounds"])
    table.add_row("speedup, last quarter", show_speedup(measured))
    table.add_row("swaps", f"{summary['swaps']} (p50 {show(swap['p50'], 1)} ms, max {show(swap['max'], 1)} ms)")
    table.add_row("dropped trajectories", str(summary["dropped_trajectories"]))
    if summary["drafter_faults"]:
        table.add_row("served without the drafter, for a fault", str(summary["drafter_faults"]))
    table.add_row("duration", f"{summary['duration_s']:.0f} s")
    return table


def draw_report(
    path: str | os.PathLike[str], finished: list[tuple[int, int]], rounds: Rounds | list[Round], swaps: list[int]
) -> None:
    """Draw acceptance length, swaps, and speedup over requests; tokens per second where nothing decoded plainly.

    Args:
        path: PNG file to write.
        finished: Speculative tokens and rounds of each request, in order of completion.
        rounds: The decoding of the run.
        swaps: Number of completed requests at each swap.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    count = len(finished)
    width = max(count // 20, 1)
    middles, lengths = [], []
    for first in range(0, count - width + 1, max(width // 2, 1)):
        tokens, steps = (sum(c) for c in zip(*finished[first : first + width], strict=True))
        if steps:
            middles.append(first + width / 2)
            lengths.append(tokens / steps)
    top.plot(middles, lengths, color="tab:blue")
    top.set_ylabel("acceptance length\n(tokens per round)")
    edges = [count * tenth / 10 for tenth in range(11)]  # tenths without a baseline window have no speedup
    measured = [((a + b) / 2, rates(r for r in rounds if a <= r.request < b)) for a, b in itertools.pairwise(edges)]
    overall = rates(rounds).speedup
    if overall:
        shown = [(at, rate.speedup) for at, rate in measured if rate.speedup]
        bottom.axhline(overall, color="tab:green", linestyle=":", label=f"whole run {overall:.2f}x")
        bottom.axhline(1.0, color="grey", linewidth=0.8)
        bottom.legend(loc="lower right")
        bottom.set_ylabel("speedup\n(speculative / plain)")
    else:  # nothing decoded plainly to compare with
        shown = [(at, rate.speculative) for at, rate in measured if rate.speculative]
        bottom.set_ylabel("tokens per second")
    if shown:
        bottom.plot(*zip(*shown, strict=True), color="tab:green", marker="o")
    bottom.set_xlabel("completed requests")
    for axis in (top, bottom):
        for at in swaps:
            axis.axvline(at, color="tab:orange", alpha=0.4, linewidth=0.8)
    top.set_title("vertical lines: weights swapped while serving", fontsize=9)
    try:
        figure.savefig(path, dpi=120)
    except OSError:
        Path(path).unlink(missing_ok=True)  # half a picture
        raise
    finally:
        plt.close(figure)

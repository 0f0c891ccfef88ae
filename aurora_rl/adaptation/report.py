"""The results of a scenario, gathered from its folder, and as tables."""

from __future__ import annotations

import json
import platform
import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

from aurora_rl.adaptation.live import per_second_summary
from aurora_rl.adaptation.metrics import (
    REGAINED,
    StreamCounts,
    block_bootstrap,
    forgotten,
    level,
    regret,
    requests_to,
    trailing_acceptance,
)
from aurora_rl.adaptation.plots import draw
from aurora_rl.adaptation.scenario import PLAIN, Scenario

LEVELS = (1.5, 1.75, 2.0)
"""Acceptance lengths; the report has how many requests an arm took to reach each."""


def collect(out: Path, scenario: Scenario) -> dict[str, Any]:
    """Return all figures of a scenario's folder.

    Raises:
        ValueError: No arm has a result yet.
    """
    names, lengths = [phase.name for phase in scenario.phases], [phase.requests for phase in scenario.phases]
    if scenario.mixed:
        names, lengths = ["mixed"], [sum(lengths)]
    bounds = list(pairwise([0, *accumulate(lengths)]))
    runs = [json.loads(path.read_text()) for path in sorted((out / "arms").glob("*/result.json"))]
    runs = [_by_request(run) for run in runs if run["arm"] in scenario.arms]
    if not runs:
        raise ValueError(f"no arm of the scenario has a result in {out} yet")
    counts = {(run["arm"], run["seed"]): StreamCounts(run["tokens"], run["rounds"]) for run in runs}
    fixed = {run["arm"]: counts[run["arm"], 0] for run in runs if not run["learns"] and run["seed"] == 0}
    any_run = next(iter(counts.values()))
    fixed[PLAIN] = StreamCounts(any_run.tokens, any_run.tokens)
    figures = [
        {
            **{key: run[key] for key in ("arm", "seed", "learns", "learner_seconds")},
            **{key: run[key] for key in ("by_position",) if key in run},
            "swaps": len(set(run["version"])) - 1,
            **_figures(counts[run["arm"], run["seed"]], run, names, bounds, scenario.window),
            "regret": regret(counts[run["arm"], run["seed"]], fixed),
            "curve": trailing_acceptance(counts[run["arm"], run["seed"]], scenario.window),
        }
        for run in runs
    ]
    return {
        "scenario": scenario.about,
        "window": scenario.window,
        "phases": [{"name": name, "first": a, "end": b} for name, (a, b) in zip(names, bounds, strict=True)],
        "part_tokens": scenario.part_tokens,
        "arms": list(scenario.arms),
        "runs": figures,
        "against_fixed": list(_against_fixed(runs, counts, bounds)),
        "live": list(_live(out, names, {run["arm"]: run for run in runs if run["seed"] == 0})),
        "versions": {name: version(name) for name in ("torch", "transformers", "torchrl", "tensordict")},
        "machine": platform.processor() or platform.machine(),
    }


def _by_request(run: dict[str, Any]) -> dict[str, Any]:
    """Return a run's figures by request, and its acceptance length by position where it was served in parts."""
    if "positions" not in run:
        return run
    at: dict[int, list[int]] = defaultdict(list)
    for index, position in enumerate(run["positions"]):
        at[position].append(index)
    lengths = [sum(run["tokens"][i] for i in at[p]) / sum(run["rounds"][i] for i in at[p]) for p in sorted(at)]
    bounds = [*at[0], len(run["positions"])]
    whole = {key: [sum(run[key][a:b]) for a, b in pairwise(bounds)] for key in ("tokens", "rounds")}
    last = {key: [run[key][end - 1] for end in bounds[1:]] for key in ("version", "steps")}
    return {**run, **whole, **last, "by_position": lengths}


def _figures(
    counts: StreamCounts, run: Mapping[str, Any], names: Sequence[str], bounds: Sequence[tuple[int, int]], window: int
) -> dict[str, Any]:
    """Return the measures of one run, see ``adaptation.metrics``."""
    parts = [counts.part(first, end) for first, end in bounds]
    tokens, levels = [0, *accumulate(counts.tokens)], dict.fromkeys(map(str, LEVELS))
    for wanted in LEVELS:
        if (requests := requests_to(counts, wanted, window)) is not None:
            flops = run["steps"][requests - 1] * run["flops_per_step"]
            levels[str(wanted)] = {"requests": requests, "tokens": tokens[requests], "flops": flops}
    phases = []
    for place, (name, part) in enumerate(zip(names, parts, strict=True)):
        before = [level(parts[earlier]) for earlier in range(place) if names[earlier] == name]
        phases.append(
            {
                "name": name,
                "acceptance": part.acceptance_length(),
                "level": level(part),
                # Of the same traffic before; else of the phase itself, which is where it settles.
                "regained_after": requests_to(part, REGAINED * (before[-1] if before else level(part)), window),
                "forgotten": forgotten(parts[names.index(name)], part) if before else None,
            }
        )
    return {"acceptance": counts.acceptance_length(), "phases": phases, "levels": levels}


def _against_fixed(
    runs: Sequence[Mapping[str, Any]], counts: Mapping[tuple[str, int], StreamCounts], bounds: Sequence[tuple[int, int]]
) -> Iterator[dict[str, Any]]:
    """Yield the ratio of acceptance lengths of each arm that learns to each that does not, phase by phase."""
    learning, fixed = ([run for run in runs if run["learns"] == learns] for learns in (True, False))
    for run, reference, (phase, bound) in product(learning, fixed, enumerate(bounds)):
        pair = [counts[each["arm"], each["seed"]].part(*bound) for each in (run, reference)]
        yield {
            "arm": run["arm"],
            "seed": run["seed"],
            "fixed": reference["arm"],
            "phase": phase,
            "ratio": pair[0].acceptance_length() / pair[1].acceptance_length(),
            "interval_95": block_bootstrap(*pair),
        }


def _live(out: Path, names: Sequence[str], runs: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield tokens per second by phase, number of slots and arm, whose first runs are given."""
    for path in sorted((out / "live").glob("*.json")):
        phase, slots = (int(part) for part in path.stem.split("-")[1::2])
        by_arm: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for sample in json.loads(path.read_text())["samples"]:
            by_arm[sample["arm"]].append(sample)
        plain = {sample["turn"]: sample["seconds"] / sample["tokens"] for sample in by_arm[PLAIN]}
        for arm, samples in by_arm.items():
            ratios = sorted(plain[s["turn"]] * s["tokens"] / s["seconds"] for s in samples)
            charge = runs[arm]["learner_seconds"] / sum(runs[arm]["tokens"]) if arm in runs else 0.0
            charged = [plain[s["turn"]] / (s["seconds"] / s["tokens"] + charge) for s in samples]
            yield {
                "phase": phase,
                "name": names[phase],
                "slots": slots,
                "arm": arm,
                "speedup": statistics.median(ratios),
                "speedups": ratios,
                "speedup_charged": statistics.median(charged),
                "tokens_per_second": per_second_summary([each for s in samples for each in s["per_second"]]),
            }


def write(out: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json``, ``report.md`` and the plots."""
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "report.md").write_text(markdown(results))
    draw(results, out)


# ---- the report -----------------------------------------------------------------------------------------------------


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of the results as Markdown."""
    phases = [phase["name"] for phase in results["phases"]]
    parts = [f"# {results['scenario'] or 'Adaptation'}\n"]
    heads = ["arm", "seeds", *(f"{place + 1}: {name}" for place, name in enumerate(phases)), "all", "regret", "swaps"]
    rows = []
    for arm in results["arms"]:
        runs = [run for run in results["runs"] if run["arm"] == arm]
        if runs:
            by_phase = [_spread([run["phases"][place]["acceptance"] for run in runs]) for place in range(len(phases))]
            overall = _spread([run["acceptance"] for run in runs])
            worse = _spread([100 * run["regret"][1] for run in runs], "{:+.1f}") + "%"
            rows.append([arm, str(len(runs)), *by_phase, overall, worse, _spread([r["swaps"] for r in runs], "{:.0f}")])
    best = next((run["regret"][0] for run in results["runs"]), PLAIN)
    parts.append(
        f"Acceptance length by phase; ± is half the range over seeds. Regret is rounds above those of `{best}`, the "
        f"best arm that does not learn.\n\n{_table(heads, rows)}"
    )
    parts.append(_learning(results))
    parts.append(_shifts(results, phases))
    parts.append(_positions(results))
    if results["live"]:
        parts.append(_speed(results))
    return "\n".join(part for part in parts if part)


def _learning(results: Mapping[str, Any]) -> str:
    rows = []
    for run in results["runs"]:
        if run["learns"]:
            cells = [
                "never" if at is None else f"{at['requests']} · {at['tokens']:,} · {at['flops'] / 1e12:.1f}"
                for at in run["levels"].values()
            ]
            rows.append([run["arm"], str(run["seed"]), *cells])
    if not rows:
        return ""
    heads = ["arm", "seed", *(f"to {wanted}" for wanted in LEVELS)]
    return (
        f"Requests · served tokens · learner TFLOP until the acceptance length of the last {results['window']} "
        f"requests first reaches the level.\n\n{_table(heads, rows)}"
    )


def _shifts(results: Mapping[str, Any], phases: Sequence[str]) -> str:
    if len(phases) < 2:
        return ""
    rows = []
    for run in results["runs"]:
        for place, phase in enumerate(run["phases"]):
            if place and run["learns"]:
                lost = "" if phase["forgotten"] is None else f"{100 * phase['forgotten']:+.1f}%"
                regained = "never" if phase["regained_after"] is None else str(phase["regained_after"])
                against = "; ".join(
                    f"{row['fixed']} {row['ratio']:.2f}{_interval(row['interval_95'])}"
                    for row in results["against_fixed"]
                    if (row["arm"], row["seed"], row["phase"]) == (run["arm"], run["seed"], place)
                )
                rows.append([run["arm"], str(run["seed"]), f"{place + 1}: {phase['name']}", regained, lost, against])
    heads = ["arm", "seed", "phase", "95% after", "forgotten", "acceptance over that of (95% interval)"]
    return f"After each shift: requests until 95% of the traffic's level are there.\n\n{_table(heads, rows)}"


def _positions(results: Mapping[str, Any]) -> str:
    runs = [run for run in results["runs"] if "by_position" in run]
    if not runs:
        return ""
    longest, size = max(len(run["by_position"]) for run in runs), results["part_tokens"]
    heads = ["arm", "seed", *(f"to {size * (place + 1):,}" for place in range(longest))]
    rows = [[run["arm"], str(run["seed"]), *(f"{length:.2f}" for length in run["by_position"])] for run in runs]
    return f"Acceptance length by the position in the answer, in tokens.\n\n{_table(heads, rows)}"


def _speed(results: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{row['phase'] + 1}: {row['name']}",
            str(row["slots"]),
            row["arm"],
            *(f"{row['tokens_per_second'][key]:.1f}" for key in ("mean", "p50", "p05", "p95")),
            f"{row['speedup']:.2f} ({row['speedups'][0]:.2f}–{row['speedups'][-1]:.2f})",
            f"{row['speedup_charged']:.2f}",
        ]
        for row in results["live"]
    ]
    heads = ["phase", "slots", "arm", "mean", "P50", "P05", "P95", "speedup, median turn (range)", "charged"]
    return (
        "Output tokens per second of a request over the last requests of each phase, arms in turns, a learner that is "
        "always busy next to those that learn. Speedup is over plain decoding in the same turn; charged, each "
        "token takes its share of the learner's CPU seconds as well.\n\n" + _table(heads, rows)
    )


def _interval(ends: Sequence[float] | None) -> str:
    return "" if ends is None else f" ({ends[0]:.2f}–{ends[1]:.2f})"


def _spread(values: Sequence[float], form: str = "{:.3f}") -> str:
    middle, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return form.format(middle) + (f" ± {half:.3f}" if half else "")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)

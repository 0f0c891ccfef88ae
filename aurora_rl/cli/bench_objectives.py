"""``aurora-rl bench objectives``: objectives that learn from a recorded stream, compared on its next requests."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from aurora_rl.cli.arguments import add_config_arguments, as_pair
from aurora_rl.cli.assembly import LoadedTarget, load, start_drafter
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.frozen import plain
from aurora_rl.cli.learner import learning
from aurora_rl.cli.signals import Stop
from aurora_rl.cli.spec import RunSpec, resolve
from aurora_rl.cli.training_data import open_recording
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.storage import write_file
from aurora_rl.training.gate import replay
from aurora_rl.training.steps import train_on

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "forward_kl": [{"name": "imitation"}],
    "reverse_kl": [{"name": "imitation", "divergence": "reverse_kl"}],
    "lk": [{"name": "imitation", "divergence": "negative_log_overlap", "renormalize": False}],
    "expected_length_weights": [{"name": "imitation", "weighting": "expected_length"}],
    "discard": [{"name": "imitation"}, {"name": "discard", "weight": 0.3}],
    "discard_reach": [{"name": "imitation"}, {"name": "discard", "weight": 0.3, "weighting": "reach"}],
    "policy_gradient": [{"name": "imitation"}, {"name": "acceptance_reward", "weight": 0.3}],
    "expected_length": [{"name": "imitation", "weight": 0.3}, {"name": "expected_length", "rule": "sample_and_match"}],
}
"""Objectives by the name of their row. The row "configured" is of those that the configuration names."""

_CONFIGURED = "configured"


HELP = "learn from one recorded stream by several objectives, and compare on what is still to come"


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--recording", type=Path, required=True, help="folder that learner.recording=... filled")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="folder of the results")
    parser.add_argument("--variants", default="forward_kl,discard", help="names; configured is objectives=...")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    parser.add_argument("--every", type=int, default=40, help="requests between two evaluations")
    parser.add_argument("--ahead", type=int, default=40, help="requests of an evaluation: the next to come")
    parser.add_argument("--limit", type=int, help="most requests of the recording")
    add_config_arguments(parser, "learner.replay=4")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Run the variants that have no result yet, then write the table and the plot of all results in the folder.

    The results may be of several recordings. Returns the exit status.

    Raises:
        ConfigError: A variant is unknown, a number is below 1, or no variant uses the objectives. The recording is too
            short, or a variant cannot learn from it. Batches do not end at the evaluations. Or a result in the folder
            has other settings.
    """
    torch.set_num_threads(config.learner.threads)
    spec, recording, out = resolve(config), arguments.recording, arguments.out
    every, ahead = arguments.every, arguments.ahead
    variants = dict.fromkeys(name.strip() for name in arguments.variants.split(","))
    known = {**VARIANTS, _CONFIGURED: plain(config.objectives)}
    for option in ("seeds", "every", "ahead", "limit"):
        number = getattr(arguments, option)
        if number is not None and number < 1:
            raise ConfigError(f"--{option} must be at least 1, got {number}")
    for variant in variants:
        if variant not in known:
            raise ConfigError(f"--variants: unknown {variant!r}; there are {', '.join(known)}")
    if _CONFIGURED not in variants and config.objectives != Config().objectives:
        raise ConfigError(f"no variant learns by objectives={known[_CONFIGURED]}; add {_CONFIGURED!r} to --variants")
    dataset = TrajectoryDataset(recording)
    count = min(len(dataset), arguments.limit or len(dataset))
    if every % config.learner.batch_size:
        raise ConfigError(f"--every {every} must be a multiple of learner.batch_size={config.learner.batch_size}")
    if count < every + ahead:
        raise ConfigError(f"--recording {recording} has {count} trajectories; at least {every + ahead} are needed")
    settings = _settings(spec, every, ahead, count, dataset.digest(count))
    missing = []
    for seed in range(arguments.seeds):
        for variant in variants:
            path = out / f"{recording.name}-{variant}-{seed}.json"
            if path.exists():
                _check_reuse(path, {"objectives": known[variant], **settings})
            else:
                missing.append((path, variant, seed))
    out.mkdir(parents=True, exist_ok=True)
    if missing:
        stream = [dataset[index] for index in range(count)]
        target = load(spec)
        # Another drafter's features may be as wide as this one's.
        open_recording(recording, target, start_drafter(spec, target, []))
    for path, variant, seed in missing:
        began, spent = time.monotonic(), time.process_time()
        with naming(f"variant {variant!r} on {recording}"):
            curves, skipped = learning_curve(
                spec, target, stream, known[variant], seed=seed, every=every, ahead=ahead,
                label=f"{recording.name} {variant} seed {seed}",
            )  # fmt: skip
        result = {
            "recording": recording.name,
            "variant": variant,
            "seed": seed,
            "settings": {"objectives": known[variant], **settings},
            "skipped": skipped,  # steps
            "seconds": round(time.monotonic() - began, 1),
            "cpu_seconds": round(time.process_time() - spent, 1),  # whatever else the machine did
            "curves": {mode: [[seen, round(a, 4)] for seen, a in curve] for mode, curve in curves.items()},
        }
        write_file(path, json.dumps(result, indent=1) + "\n")
    results = _results(out)
    (out / "table.md").write_text(_markdown(results))
    _plot(results, out / "curves.png")
    print(f"{len(results)} runs in {out}: table.md, curves.png", flush=True)
    return 0


def learning_curve(
    spec: RunSpec,
    target: LoadedTarget,
    stream: Sequence[TensorDictBase],
    objectives: list[dict[str, Any]],
    *,
    seed: int,
    every: int,
    ahead: int,
    label: str,
) -> tuple[dict[str, list[tuple[int, float]]], int]:
    """Return the acceptance length on the next ``ahead`` requests of a stream, after every ``every`` learned from.

    Likeliest drafts are evaluated always, since they are served by default; sampled ones as well if the configuration
    samples. ``seed`` is that of the drafter's start and of replay. ``label`` begins the lines that are printed.

    Returns:
        (requests learned from, acceptance length) by the mode of the drafts; and how many steps were skipped.
    """
    prompts = [t["sequence", "tokens"][: int(t["sequence", "prompt_length"])].tolist() for t in stream[:64]]
    drafter = start_drafter(spec, target, prompts, seed=seed).to(spec.device)
    config, settings = spec.config, spec.config.learner
    shapes = {mode: replace(spec.tree, mode=mode) for mode in dict.fromkeys(("topk", spec.tree.mode))}
    arm = replace(spec, config=replace(config, objectives=tuple(objectives)))
    loss, optimizers = learning(arm, drafter, target.parts.head)
    served = drafter.serving_copy(spec.dtype)
    curves: dict[str, list[tuple[int, float]]] = {mode: [] for mode in shapes}

    def evaluate(seen: int) -> None:
        served.install(drafter.published())
        for mode, shape in shapes.items():
            acceptance = replay(served, stream[seen : seen + ahead], shape).acceptance_length
            curves[mode].append((seen, acceptance))
            print(f"{label}: {seen} requests, {mode} drafts, {acceptance:.3f} a round", flush=True)

    evaluate(0)
    skipped: list[str] = []
    steps = train_on(
        stream[: (len(stream) - ahead) // every * every],  # up to the last evaluation
        loss,
        optimizers,
        batch_size=settings.batch_size,
        replay=settings.replay,
        autocast=spec.dtype == torch.bfloat16,
        seed=seed,
        max_skipped=settings.max_skipped,
        on_skip=skipped.append,
    )
    for seen, _, _ in steps:
        if seen % every == 0:
            evaluate(seen)
    return curves, len(skipped)


def _settings(spec: RunSpec, every: int, ahead: int, count: int, digest: str) -> dict[str, Any]:
    """Return the settings that a curve depends on, by their configuration keys. Objectives and seed are left out."""
    config = spec.config
    drafter, learner = plain(config.drafter), plain(config.learner)
    return {
        "model": config.model,
        "dtype": str(spec.dtype).removeprefix("torch."),
        **{f"drafter.{k}": v for k, v in drafter.items() if k not in ("trained_for", "adaptive")},  # these change none
        **{f"learner.{k}": learner[k] for k in ("batch_size", "replay", "muon_lr", "adam_lr")},
        "--every": every,
        "--ahead": ahead,
        "--limit": count,
        "checksum of the recording": digest,
    }


def _results(out: Path) -> list[dict[str, Any]]:
    """Return the results in a folder. Other files, such as a run's summary, are left alone."""
    found = []
    for path in sorted(out.glob("*-*-*.json")):
        with contextlib.suppress(ValueError, OSError):
            result = json.loads(path.read_text())
            if isinstance(result, dict) and {"recording", "variant", "curves"} <= result.keys():
                found.append(result)
    return found


def _check_reuse(path: Path, settings: dict[str, Any]) -> None:
    """Raise ConfigError where a result was made with other settings."""
    earlier = json.loads(path.read_text()).get("settings")
    if earlier is None:
        print(f"{path} does not say its settings, as older results do not; it is taken as it is", flush=True)
        return
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise ConfigError(
                f"{path} was made with {as_pair(name, earlier.get(name))}, and this run has {as_pair(name, value)}; "
                "name another folder by --out"
            )


def mean_curves(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[tuple[int, float, float]]]:
    """Return (requests learned from, mean acceptance length, spread over seeds) by (recording, draft mode, variant)."""
    points: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for mode, curve in result["curves"].items():
            for seen, acceptance in curve:
                points[result["recording"], mode, result["variant"]][seen].append(acceptance)
    return {
        key: [(seen, sum(a) / len(a), max(a) - min(a)) for seen, a in sorted(curve.items())]
        for key, curve in sorted(points.items())
    }


def _markdown(results: Sequence[dict[str, Any]]) -> str:
    curves = mean_curves(results)
    seeds = Counter((r["recording"], r["variant"]) for r in results)
    at = sorted({seen for curve in curves.values() for seen, _, _ in curve})
    rows = [["recording", "drafts", "objectives", "seeds", *map(str, at)]]
    for (recording, mode, variant), curve in curves.items():
        cells = {seen: f"{mean:.3f}" + (f" ± {spread / 2:.3f}" if spread else "") for seen, mean, spread in curve}
        rows.append([recording, mode, variant, str(seeds[recording, variant]), *(cells.get(seen, "–") for seen in at)])
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    return "".join([lines[0], "|---" * len(rows[0]) + "|\n", *lines[1:]])


def _plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    curves = mean_curves(results)
    panels = sorted({(recording, mode) for recording, mode, _ in curves})
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.5 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    # A variant has one colour in all panels, and stands in the legend also where the first panel lacks it.
    colours = {variant: f"C{number}" for number, variant in enumerate(sorted({variant for _, _, variant in curves}))}
    lines = {}
    axis_of = dict(zip(panels, axes.flat, strict=False))
    for (recording, mode, variant), curve in curves.items():
        points = zip(*((seen, mean) for seen, mean, _ in curve), strict=True)
        (lines[variant],) = axis_of[recording, mode].plot(*points, color=colours[variant])
    for (recording, mode), axis in axis_of.items():
        axis.set_title(f"{recording}, {mode} drafts")
        axis.set_xlabel("requests learned from")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("acceptance length on the next requests")
    figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=120)

"""``aurora-rl bench objectives``: what objectives learn from a recorded stream, shown on requests still to come."""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from aurora_rl.cli.arguments import add_config_arguments
from aurora_rl.cli.config import Config, ConfigError
from aurora_rl.cli.signals import Stop
from aurora_rl.cli.spec import RunSpec, Target, load, resolve, start_drafter
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import SumLoss, make_objectives
from aurora_rl.training.gate import replay
from aurora_rl.training.offline import train_on
from aurora_rl.training.optimizers import drafter_optimizers

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


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    text = "learn from one recorded stream by several objectives, and compare on what is still to come"
    parser = parser.add_subparsers(dest="what", required=True).add_parser("objectives", help=text, description=text)
    parser.add_argument("--recording", type=Path, required=True, help="folder that learner.record=... filled")
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"), help="folder of the results")
    parser.add_argument("--variants", default="forward_kl,discard", help="names; configured is objectives=...")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    parser.add_argument("--every", type=int, default=40, help="requests between two evaluations")
    parser.add_argument("--ahead", type=int, default=40, help="requests of an evaluation: the next to come")
    parser.add_argument("--limit", type=int, help="most requests of the recording")
    add_config_arguments(parser, "learner.replay=4")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Run the variants that have no result yet. Returns the exit status."""
    torch.set_num_threads(config.learner.threads)
    bench_objectives(
        config,
        arguments.recording,
        arguments.out,
        variants=[name.strip() for name in arguments.variants.split(",")],
        seeds=arguments.seeds,
        every=arguments.every,
        ahead=arguments.ahead,
        limit=arguments.limit,
        say=lambda line: print(line, flush=True),
    )
    return 0


def learning_curve(
    spec: RunSpec,
    target: Target,
    stream: Sequence[TensorDictBase],
    objectives: list[dict[str, Any]],
    *,
    seed: int,
    every: int,
    ahead: int,
    tell: Callable[[int, str, float], None],
) -> tuple[dict[str, list[tuple[int, float]]], int]:
    """Acceptance length on the next requests of a stream, after every so many learned from.

    Likeliest drafts are evaluated always, since they are served by default; sampled ones as well if the configuration
    samples.

    Args:
        spec: Drafter, learner and tree.
        target: Target that the stream was recorded with.
        stream: Trajectories in order of arrival.
        objectives: Names and settings.
        seed: Seed of the drafter's start and of replay.
        every: Requests between two evaluations, a multiple of ``learner.batch_size``.
        ahead: Requests of an evaluation, the next of the stream, which were not learned from yet.
        tell: Called with each point as it comes.

    Returns:
        (requests learned from, acceptance length) by the mode of the drafts; and how many steps were skipped.
    """
    prompts = [t["sequence", "tokens"][: int(t["sequence", "prompt_length"])].tolist() for t in stream[:64]]
    drafter = start_drafter(replace(spec, config=replace(spec.config, seed=seed)), target, prompts)
    dtype, settings, served_shape = spec.dtype, spec.config.learner, spec.tree
    shapes = {mode: replace(served_shape, mode=mode) for mode in dict.fromkeys(("topk", served_shape.mode))}
    loss = SumLoss(make_objectives(objectives, drafter, TargetHead.like(target.parts.head).float()))
    optimizers = drafter_optimizers(drafter, muon_lr=settings.muon_lr, adam_lr=settings.adam_lr)
    served = copy.deepcopy(drafter).to(dtype).eval().requires_grad_(False)
    curves: dict[str, list[tuple[int, float]]] = {mode: [] for mode in shapes}

    def evaluate(seen: int) -> None:
        served.install(drafter.published())
        coming = [stream[index] for index in range(seen, seen + ahead)]
        for mode, shape in shapes.items():
            acceptance = replay(served, coming, shape).acceptance_length
            curves[mode].append((seen, acceptance))
            tell(seen, mode, acceptance)

    evaluate(0)
    skipped: list[str] = []
    steps = train_on(
        stream[: (len(stream) - ahead) // every * every],  # up to the last evaluation
        loss,
        optimizers,
        batch_size=settings.batch_size,
        replay=settings.replay,
        autocast=dtype == torch.bfloat16,
        seed=seed,
        max_skipped=settings.max_skipped,
        on_skip=skipped.append,
    )
    for seen, _, _ in steps:
        if seen % every == 0:
            evaluate(seen)
    return curves, len(skipped)


def bench_objectives(
    config: Config,
    recording: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    variants: Sequence[str],
    seeds: int,
    every: int,
    ahead: int,
    limit: int | None,
    say: Callable[[str], None],
) -> None:
    """Run the variants that have no result yet, then write the table and the plot of all results in the folder.

    Args:
        config: Configuration of the runs.
        recording: Folder of a recorded stream.
        out: Folder of the results, one file a run; its table and plot cover every recording that it has results of.
        variants: Names of :data:`VARIANTS`, or "configured" for the objectives of ``config``.
        seeds: Runs of each variant.
        every: Requests between two evaluations.
        ahead: Requests of an evaluation.
        limit: Most requests of the recording.
        say: Takes a line of progress.

    Raises:
        ConfigError: An unknown variant, a number below 1, objectives that no variant uses, a recording that is too
            short or that a variant cannot learn from, batches that do not end at the evaluations, or a result that
            was made with other settings.
    """
    recording, out = Path(recording), Path(out)
    spec = resolve(config)
    _check_arguments(config, variants, seeds=seeds, every=every, ahead=ahead, limit=limit)
    known = {**VARIANTS, _CONFIGURED: config.objectives}
    found = TrajectoryDataset(recording)
    count = min(len(found), limit or len(found))
    if every % config.learner.batch_size:
        raise ConfigError(f"--every {every} must be a multiple of learner.batch_size={config.learner.batch_size}")
    if count < every + ahead:
        raise ConfigError(f"--recording {recording} has {count} trajectories; at least {every + ahead} are needed")
    settings = _settings(spec, every, ahead, count, found.digest(count))
    missing = []
    for seed in range(seeds):
        for variant in dict.fromkeys(variants):
            path = _result(out, recording, variant, seed)
            if path.exists():
                _check_reuse(path, {"objectives": known[variant], **settings}, say)
            else:
                missing.append((variant, seed))
    out.mkdir(parents=True, exist_ok=True)
    if missing:
        stream = [found[index] for index in range(count)]
        target = load(spec)
        # Another drafter's features may be as wide as this one's.
        TrajectoryDataset(recording, start_drafter(spec, target, []).feature_layers)
        for variant, seed in missing:
            began, spent = time.monotonic(), time.process_time()

            def tell(seen: int, mode: str, acceptance: float, variant: str = variant, seed: int = seed) -> None:
                say(f"{recording.name} {variant} seed {seed}: {seen} requests, {mode} drafts, {acceptance:.3f} a round")

            try:
                curves, skipped = learning_curve(
                    spec, target, stream, known[variant], seed=seed, every=every, ahead=ahead, tell=tell
                )
            except ValueError as error:
                raise ConfigError(f"variant {variant!r} on {recording}: {error}") from error
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
            part = _result(out, recording, variant, seed).with_suffix(".part")
            part.write_text(json.dumps(result, indent=1) + "\n")
            part.replace(_result(out, recording, variant, seed))
    results = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    (out / "table.md").write_text(_markdown(results))
    _plot(results, out / "curves.png")
    say(f"{len(results)} runs in {out}: table.md, curves.png")


def _check_arguments(config: Config, variants: Sequence[str], **numbers: int | None) -> None:
    """Raise ConfigError for what can be told before anything is read."""
    for option, number in numbers.items():
        if number is not None and number < 1:
            raise ConfigError(f"--{option} must be at least 1, got {number}")
    for variant in variants:
        if variant not in (*VARIANTS, _CONFIGURED):
            raise ConfigError(f"--variants: unknown {variant!r}; there are {', '.join((*VARIANTS, _CONFIGURED))}")
    if _CONFIGURED not in variants and config.objectives != Config().objectives:
        raise ConfigError(f"no variant learns by objectives={config.objectives}; add {_CONFIGURED!r} to --variants")


def _settings(spec: RunSpec, every: int, ahead: int, count: int, digest: str) -> dict[str, Any]:
    """What a curve depends on, apart from its objectives and its seed, by the names that the user knows."""
    config = spec.config
    drafter, learner = asdict(config.drafter), asdict(config.learner)
    return {
        "model": config.model,
        "dtype": str(spec.dtype).removeprefix("torch."),
        **{f"drafter.{k}": v for k, v in drafter.items() if k not in ("made_for", "adaptive")},  # these change none
        **{f"learner.{k}": learner[k] for k in ("batch_size", "replay", "muon_lr", "adam_lr")},
        "--every": every,
        "--ahead": ahead,
        "--limit": count,
        "checksum of the recording": digest,
    }


def _check_reuse(path: Path, settings: dict[str, Any], say: Callable[[str], None]) -> None:
    """Raise ConfigError where a result was made with other settings."""
    earlier = json.loads(path.read_text()).get("settings")
    if earlier is None:
        say(f"{path} does not say its settings, as older results do not; it is taken as it is")
        return
    for name, value in settings.items():
        if earlier.get(name) != value:
            raise ConfigError(
                f"{path} was made with {name}={earlier.get(name)}, and this run has {name}={value}; name another "
                "folder by --out"
            )


def _result(out: Path, recording: Path, variant: str, seed: int) -> Path:
    return out / f"{recording.name}-{variant}-{seed}.json"


def mean_curves(results: Sequence[dict[str, Any]]) -> dict[tuple[str, str, str], list[tuple[int, float, float]]]:
    """By recording, mode of drafts and variant: requests learned from, mean acceptance length and spread over seeds."""
    points: dict[tuple[str, str, str], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for mode, curve in result["curves"].items():
            for seen, acceptance in curve:
                points[result["recording"], mode, result["variant"]][seen].append(acceptance)
    return {
        key: [(seen, sum(a) / len(a), max(a) - min(a)) for seen, a in sorted(curve.items())]
        for key, curve in sorted(points.items())
    }


def _rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    curves = mean_curves(results)
    seeds = Counter((r["recording"], r["variant"]) for r in results)
    at = sorted({seen for curve in curves.values() for seen, _, _ in curve})
    rows = [["recording", "drafts", "objectives", "seeds", *(str(seen) for seen in at)]]
    for (recording, mode, variant), curve in curves.items():
        cells = {seen: f"{mean:.3f}" + (f" ± {spread / 2:.3f}" if spread else "") for seen, mean, spread in curve}
        rows.append([recording, mode, variant, str(seeds[recording, variant]), *(cells.get(seen, "–") for seen in at)])
    return rows


def _markdown(results: Sequence[dict[str, Any]]) -> str:
    rows = _rows(results)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def _plot(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = mean_curves(results)
    panels = sorted({(recording, mode) for recording, mode, _ in curves})
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(4 * columns, 3.5 * rows), sharey=True, squeeze=False, layout="constrained"
    )
    # A variant has one colour in all panels, and stands in the legend also where the first panel lacks it.
    colours = {variant: f"C{number}" for number, variant in enumerate(sorted({variant for _, _, variant in curves}))}
    lines = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        for (recording, mode, variant), curve in curves.items():
            if (recording, mode) == panel:
                points = zip(*((seen, mean) for seen, mean, _ in curve), strict=True)
                (lines[variant],) = axis.plot(*points, color=colours[variant])
        axis.set_title(f"{panel[0]}, {panel[1]} drafts")
        axis.set_xlabel("requests learned from")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_ylabel("acceptance length on the next requests")
    figure.legend(lines.values(), lines.keys(), fontsize=8, loc="outside lower center", ncols=len(lines))
    figure.savefig(path, dpi=120)
    plt.close(figure)

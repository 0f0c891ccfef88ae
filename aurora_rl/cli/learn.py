"""``aurora-rl learn``: the training half of a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aurora_rl.cli.arguments import SAVED_LAST, add_config_arguments, add_end_argument, add_resume_argument
from aurora_rl.cli.config import Config
from aurora_rl.cli.ranks import own_device, place_of
from aurora_rl.cli.run_dir import RunDir
from aurora_rl.cli.signals import Stop, end_with
from aurora_rl.memory import importing
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.loggers import check_installed, logged
from aurora_rl.telemetry.outputs import one_line

if TYPE_CHECKING:
    from aurora_rl.training.parallel import Ranks


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the server that the learner belongs to
    add_resume_argument(parser, SAVED_LAST)
    add_end_argument(parser)
    add_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Learn until a signal comes. Returns the exit status."""
    place = place_of(config)
    logger = config.telemetry.logger if arguments.parent is None else None  # a server logs those of its learner
    check_installed(logger)
    os.nice(config.learner.nice)  # before the model is loaded: the server times its rounds meanwhile
    if arguments.parent is not None:  # a server's own learner shares its folder, where its configuration is already
        end_with(arguments.parent)
        return _learn(config, stop, logger, contextlib.nullcontext())
    ranks, device = None, config.device
    if place is not None:
        with importing():
            import torch

            from aurora_rl.training.parallel import join

        device = own_device(config, place)
        ranks = join(torch.device(device))
        if ranks.rank:
            return _follow(replace(config, device=device), ranks, stop)
    folder = RunDir(config, ["learner.yaml"], suffix="-learner", resume=arguments.resume is not None)
    arguments.run_dir = folder.path
    with contextlib.closing(folder):
        return _learn(replace(folder.config, device=device), stop, logger, folder.undone_if_refused(), ranks)


def _follow(config: Config, ranks: Ranks, stop: Stop) -> int:
    """Compute this process's part of each step until rank 0 ends. Returns the exit status."""
    import torch

    from aurora_rl.cli.learner import build_follower
    from aurora_rl.cli.spec import resolve
    from aurora_rl.training.parallel import follow

    torch.set_num_threads(config.learner.threads)
    spec = resolve(config)
    loss, optimizers = build_follower(spec, ranks)
    stop.ignore()  # torchrun sends a signal to all processes, and rank 0 has a step and a training state to complete
    try:
        follow(loss, optimizers, autocast=spec.dtype == torch.bfloat16)
    except ValueError as error:  # the program's fault, not its input's: show where
        raise RuntimeError(f"rank {ranks.rank} stopped: {type(error).__name__}: {one_line(error)}") from error
    ranks.leave()
    return 0


def _learn(
    config: Config,
    stop: Stop,
    logger: str | None,
    refused: contextlib.AbstractContextManager[None],
    ranks: Ranks | None = None,
) -> int:
    """Learn in the folder of a run until a signal comes. Returns the exit status."""
    run_dir = Path(config.run_dir or "")
    log = MetricsLog(run_dir / "metrics.jsonl", "learner", config.telemetry.max_log)

    with importing():
        import torch

        from aurora_rl.cli.learner import build_learner
        from aurora_rl.cli.spec import resolve
        from aurora_rl.training.parallel import RankCommand, RanksLostError

    torch.set_num_threads(config.learner.threads)
    with refused:
        learner = build_learner(resolve(config), log, run_dir, ranks)
    stop.working = True
    log.write("learner_ready", pid=os.getpid(), seen=learner.seen)
    print(f"learning; metrics and training states in {run_dir}", flush=True)
    with contextlib.closing(learner), logged(logger, run_dir):
        try:
            while not stop.requested:
                learner.step()
                if ranks is not None:
                    ranks.stay()
        except RanksLostError:
            learner.try_save()  # saves the weights before the lost step
            raise
        except (ValueError, OSError) as error:  # the program's fault, not its input's: show where
            raise RuntimeError(f"learning stopped: {type(error).__name__}: {one_line(error)}") from error
        stop.ignore()
        learner.try_save()
        if ranks is not None:
            ranks.tell(RankCommand.END)
            ranks.leave()
    log.write("learner_done", seen=learner.seen, steps=learner.steps, version=learner.version)
    for failure in learner.outputs.failures.values():
        print(f"aurora-rl: {failure}", file=sys.stderr)
    return 1 if learner.outputs.failures else 0

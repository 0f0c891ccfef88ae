"""``aurora-rl learn``: the training half of a run."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

from aurora_rl.cli.arguments import add_config_arguments, add_resume_argument
from aurora_rl.cli.config import Config
from aurora_rl.cli.run_dir import RunDir
from aurora_rl.cli.signals import Stop
from aurora_rl.memory import importing
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.loggers import check_installed, logged
from aurora_rl.telemetry.outputs import one_line


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the server that the learner belongs to
    add_resume_argument(parser)
    add_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Learn until a signal comes. Returns the exit status."""
    parent: int | None = arguments.parent
    logger = config.telemetry.logger if parent is None else None  # a server logs those of its learner
    check_installed(logger)
    os.nice(config.learner.nice)  # before the model is loaded: the server times its rounds meanwhile
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # A server's own learner shares its folder, where its configuration is already.
    resume = arguments.resume is not None
    if parent is not None:
        return _learn(config, stop, logger, contextlib.nullcontext())
    folder = RunDir(config, ["learner.yaml"], suffix="-learner", resume=resume)
    arguments.run_dir = folder.path
    with contextlib.closing(folder):
        return _learn(folder.config, stop, logger, folder.undone_if_refused())


def _learn(config: Config, stop: Stop, logger: str | None, refused: contextlib.AbstractContextManager[None]) -> int:
    """Learn in the folder of a run until a signal comes. Returns the exit status."""
    run_dir = Path(config.run_dir or "")
    log = MetricsLog(run_dir / "metrics.jsonl", "learner", config.telemetry.max_log)

    with importing():
        import torch

        from aurora_rl.cli.learner import build_learner
        from aurora_rl.cli.spec import resolve

    torch.set_num_threads(config.learner.threads)
    with refused:
        learner = build_learner(resolve(config), log, run_dir)
    stop.working = True
    log.write("learner_ready", pid=os.getpid(), seen=learner.seen)
    print(f"learning; metrics and checkpoints in {run_dir}", flush=True)
    with contextlib.closing(learner), logged(logger, run_dir):
        try:
            while not stop.requested:
                learner.step()
        except (ValueError, OSError) as error:  # the program's fault, not its input's: show where
            raise RuntimeError(f"learning stopped: {type(error).__name__}: {one_line(error)}") from error
        stop.ignore()
        learner.try_save()
    log.write("learner_done", seen=learner.seen, steps=learner.steps, version=learner.version)
    for failure in learner.outputs.failures.values():
        print(f"aurora-rl: {failure}", file=sys.stderr)
    return 1 if learner.outputs.failures else 0


def _end_with(parent: int) -> None:
    """End this process in good order once the server that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)

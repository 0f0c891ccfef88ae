"""Figures of a run's events, logged by one of TorchRL's loggers."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.telemetry.outputs import one_line

if TYPE_CHECKING:
    from torchrl.record.loggers import Logger

logger = logging.getLogger(__name__)

LOGGERS = ("csv", "tensorboard", "wandb", "mlflow")
# The events that are logged, and the field of each that counts its steps: completed requests or optimizer steps.
# `aurora-rl train` serves nothing, and counts batches.
_STEPS = {
    "status": "requests", "swap": "requests", "train": "steps", "gate": "steps", "drops": "steps",
    "engines": "steps", "evaluation": "batches",
}  # fmt: skip
_TURN_S, _END_S = 1.0, 30.0


def check_installed(name: str | None) -> None:
    """Raise ValueError, with the command that installs it, where the package of one of :data:`LOGGERS` is missing."""
    if name not in (None, "csv") and importlib.util.find_spec(name) is None:
        raise ValueError(f"telemetry.logger={name} needs the package {name}: pip install {name}")


def figures(event: Mapping[str, Any]) -> tuple[int, dict[str, float]]:
    """Return the step of an event that is logged, and its numbers by name.

    Example:
        >>> figures({"event": "swap", "time": 3.5, "source": "server", "requests": 8, "version": 2, "ms": 1.5})
        (8, {'swap/version': 2.0, 'swap/ms': 1.5})
        >>> figures({"event": "evaluation", "batches": 4, "acceptance_length": 2.0, "domains": {"": 1.5}})
        (4, {'evaluation/acceptance_length': 2.0, 'evaluation/domains/none': 1.5})
    """
    kind = event["event"]
    counter = _STEPS[kind] if _STEPS[kind] in event else "batches"
    fields = {name: value for name, value in event.items() if name not in ("time", counter)}
    return event[counter], dict(_numbers(kind, fields))


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers within a value; those of a list by their places, from 1 on."""
    if isinstance(value, int | float):
        yield name, float(value)
    elif isinstance(value, list):
        yield from _numbers(name, dict(enumerate(value, 1)))
    elif isinstance(value, dict):
        for key, each in value.items():
            # Names become paths of files, and domains are called as users like.
            part = re.sub(r"[^\w-]+", "_", str(key))
            yield from _numbers(f"{name}/{part or 'none'}", each)


class EventLogger:
    """Follow a run's ``metrics.jsonl``, where both of its processes write, and log the figures of its events.

    All of it happens in a thread, so that serving waits for no logger. What cannot be logged is lost: the first failure
    is warned of. Logs go to ``logs`` in the folder of the run.

    Raises:
        ValueError: The logger does not start.
    """

    def __init__(self, name: str, run_dir: Path) -> None:
        self._name, self._run_dir, self._failed = name, run_dir, False
        self._reader = MetricsReader(run_dir / "metrics.jsonl", from_now=True)
        self._ended = threading.Event()
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="logger", daemon=True)
        self._thread.start()
        try:
            started.result()
        except Exception as error:
            raise ValueError(f"telemetry.logger={name} does not start: {one_line(error) or repr(error)}") from error

    def close(self) -> None:
        """Log what is left and end, which takes half a minute at most."""
        self._ended.set()
        self._thread.join(_END_S)
        if self._thread.is_alive():
            logger.warning("telemetry.logger=%s did not end in %.0f s; what it holds is lost", self._name, _END_S)

    def _run(self, started: Future[None]) -> None:
        try:
            target = _open(self._name, self._run_dir)  # here: MLflow knows its run in one thread alone
        except Exception as error:
            started.set_exception(error)
            return
        started.set_result(None)
        while not self._ended.wait(_TURN_S):
            self._attempt(self._follow, target)
        self._attempt(self._follow, target)
        self._attempt(target.shutdown)

    def _follow(self, target: Logger) -> None:
        for event in self._reader:
            if event["event"] in _STEPS:
                step, numbers = figures(event)
                self._attempt(target.log_metrics, numbers, step)
                if self._name == "csv":
                    target.experiment.scalars.clear()  # all that it has written so far

    def _attempt(self, action: Callable[..., object], *arguments: object) -> None:
        try:
            action(*arguments)
        except Exception as error:  # a logger may fail in any way, and is no reason to end a run
            if not self._failed:
                reason = one_line(error) or repr(error)
                logger.warning("telemetry.logger=%s lost figures, and the run goes on: %s", self._name, reason)
            self._failed = True


def logged(name: str | None, run_dir: Path) -> contextlib.AbstractContextManager[object]:
    """Log the events of a run while the block runs; see :class:`EventLogger`. Without a name nothing is logged."""
    return contextlib.nullcontext() if name is None else contextlib.closing(EventLogger(name, run_dir))


def _open(name: str, run_dir: Path) -> Logger:
    from torchrl.record.loggers import get_logger
    from torchrl.record.loggers.mlflow import MLFlowLogger

    folder, run = run_dir.resolve() / "logs", run_dir.resolve().name
    if name != "mlflow":
        return get_logger(name, str(folder), run)
    folder.mkdir(exist_ok=True)  # a database: MLflow gave up its folders of files
    return MLFlowLogger(run, f"sqlite:///{folder}/mlflow.db", artifact_location=(folder / "artifacts").as_uri())

"""The folder of a run: made new for each run, and removed again if the run is refused."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

from aurora_rl.cli.config import Config, ConfigError, to_yaml


def new_run_dir(config: Config, document: str, *, suffix: str = "") -> Path:
    """Make the folder of a run, with its configuration in ``document``, and note it in the configuration.

    Raises:
        ConfigError: the folder cannot be made, or holds something already.
    """
    folder = Path(config.run_dir or "runs")
    try:
        if config.run_dir:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(
                    f"run_dir={config.run_dir!r} is not empty, and a run would overwrite what it holds; name a new "
                    "folder, or leave run_dir out for runs/<time>"
                )
        else:
            folder = _folder_of_now(folder, suffix)
        config.run_dir = str(folder)
        # "x": of two runs that find the folder empty at the same time, one is refused here.
        with open(folder / document, "x", encoding="utf-8") as file:
            file.write(to_yaml(config, run_dir=False))
    except OSError as error:
        raise ConfigError(f"run_dir={str(folder)!r} cannot be used: {error.strerror}") from error
    return folder


def _folder_of_now(parent: Path, suffix: str) -> Path:
    """Make a folder named by the time; runs of the same second get a number."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    while True:
        folder = parent / next(names)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


@contextlib.contextmanager
def gone_if_refused(run_dir: Path) -> Iterator[None]:
    """Remove a run's new folder if what the user asked for is refused, unless another process's log in it says why."""
    try:
        yield
    except (ValueError, OSError):
        if not any(run_dir.glob("*.log")):
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


def write_traceback(error: Exception, run_dir: str | None, command: str) -> Path:
    """Write a traceback into the run's folder, or into a temporary file where that cannot take it."""
    text = "".join(traceback.format_exception(error))
    path = Path(run_dir or tempfile.mkdtemp(prefix="aurora-rl-")) / f"{command}-traceback.txt"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:  # the run's folder is full, or gone
        path = Path(tempfile.mkdtemp(prefix="aurora-rl-")) / path.name
        path.write_text(text, encoding="utf-8")
    return path

"""The folder of a run: new for each run, or continued by ``--resume``."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from aurora_rl.cli.arguments import as_pair, pair_of
from aurora_rl.cli.config import Config, load_config, to_yaml
from aurora_rl.cli.errors import ConfigError
from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.training.states import newest_valid

TRAINING = "train.json"
"""File that only the folder of ``aurora-rl train`` has: its options."""


class RunDir:
    """The folder of a run, with its configuration in it.

    No other process can resume the run until this one closes the folder or ends.

    A run that resumes appends to the lines of the earlier one. What it writes anew is kept in ``part-1``, the next time
    in ``part-2``, and so on.

    Args:
        config: Configuration of the run, which is saved: it starts another run elsewhere.
        documents: Files that this command writes anew; the first gets the configuration. Without any nothing is saved.
        suffix: End of the name of a folder that is named by the time.
        resume: Whether ``config.run_dir`` holds an earlier run to continue.

    Attributes:
        path: The folder.
        config: Configuration to run by: it has the folder in ``run_dir``, and of a run that resumes the drafter and the
            training state to go on from.

    Raises:
        ConfigError: The folder cannot be made, it holds something already and is not resumed, or its run still goes on.
    """

    def __init__(
        self, config: Config, documents: Sequence[str] = (), *, suffix: str = "", resume: bool = False
    ) -> None:
        self.path, self._part, self._resumed = Path(config.run_dir or "runs"), None, resume
        self._new_folders = [folder for folder in self.path.parents if not folder.exists()]
        try:
            if resume:
                self._lock = _locked(self.path)
                resumed, broken = go_on(replace(config, run_dir=str(self.path)), self.path)
                if broken:
                    raise ConfigError(
                        f"--resume {self.path}: no training state can be used: {'; '.join(broken)}; remove "
                        f"{self.path / 'learner'} to learn anew from the drafter that was served"
                    )
                if documents:
                    self._part = self._keep(documents)
            elif config.run_dir:
                self.path.mkdir(parents=True, exist_ok=True)
                if any(self.path.iterdir()):
                    raise ConfigError(
                        f"run_dir={config.run_dir!r} is not empty, and a run would overwrite what it holds; name a new "
                        f"folder, leave run_dir out for runs/<time>, or go on with that run: --resume {config.run_dir}"
                    )
            else:
                self._new_folders = [] if self.path.exists() else [self.path]
                self.path = _folder_of_now(self.path, suffix)
            self.config = replace(config, run_dir=str(self.path))
            if documents:
                # "x": of two runs that find the folder empty at the same time, one is refused here.
                with open(self.path / documents[0], "x", encoding="utf-8") as file:
                    file.write(to_yaml(config, run_dir=False))
            if resume:
                self.config = resumed
            else:
                self._lock = _locked(self.path)
        except OSError as error:
            reason = "it is a file" if self.path.is_file() else error.strerror
            raise ConfigError(
                f"run_dir={str(self.path)!r} cannot be used: {reason}; name a new folder where this user may write"
            ) from error

    def _keep(self, documents: Sequence[str]) -> Path:
        """Move the documents of the earlier run into a folder of their own."""
        names = (f"part-{number}" for number in itertools.count(1))
        part = next(self.path / name for name in names if not (self.path / name).exists())
        part.mkdir()
        for name in documents:
            if (self.path / name).exists():
                (self.path / name).rename(part / name)
        return part

    @contextlib.contextmanager
    def undone_if_refused(self) -> Iterator[None]:
        """Leave no trace of a run that is refused, unless another process's log in a new folder says why."""
        try:
            yield
        except (ValueError, OSError):
            if self._part is not None:
                for path in self._part.iterdir():
                    path.replace(self.path / path.name)
                self._part.rmdir()
            elif not self._resumed and not any(log.stat().st_size for log in self.path.glob("*.log")):
                shutil.rmtree(self.path, ignore_errors=True)
                with contextlib.suppress(OSError):  # something else is in there by now
                    for folder in self._new_folders:
                        folder.rmdir()
            raise

    def close(self) -> None:
        """Let other processes resume the run."""
        os.close(self._lock)


def make_absolute(config: Config) -> Config:
    """Return a configuration with absolute paths, so that it means the same in every folder when it is saved."""

    def path(name: str | None) -> str | None:
        return None if name is None else os.path.abspath(name)

    def found(name: str) -> str:  # else it is a name, or an id of the hub
        return os.path.abspath(name) if os.path.exists(name) else name

    def compared(name: str) -> str:
        from aurora_rl.policies.registry import names_drafter  # it needs torch

        return name if names_drafter(name) else found(name)

    drafter, learner = config.drafter, config.learner
    return replace(
        config,
        model=config.model if config.model == Config.model else found(config.model),
        traffic=replace(config.traffic, path=path(config.traffic.path)),
        drafter=drafter if drafter.path is None else replace(drafter, path=found(drafter.path)),
        http=replace(config.http, api_keys=path(config.http.api_keys)),
        wire=replace(config.wire, keys=path(config.wire.keys)),
        learner=replace(learner, recording=path(learner.recording), resume=path(learner.resume)),
        compare=tuple(map(compared, config.compare)),
    )


def _locked(folder: Path) -> int:
    """Return the descriptor of a run's folder, which this process has locked until it closes that or ends."""
    file = os.open(folder, os.O_RDONLY)  # not its log, which whoever writes a line locks
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise ConfigError(
            f"--resume {folder}: the run in this folder still goes on, and two would write over each other; wait for "
            "its end or stop it first"
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def _folder_of_now(parent: Path, suffix: str) -> Path:
    """Make a folder named by the time; runs of the same second get a number."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    while True:
        folder = parent / next(names)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def resumed_config(
    command: str, folder: str, path: str | None, overrides: Sequence[str], usual: Sequence[str] = ()
) -> Config:
    """Read the configuration that the run in ``folder`` was started with.

    A YAML file at ``path`` takes the place of the saved configuration. Of a training, whose settings stay, it replaces
    only the values that it names.

    Raises:
        ConfigError: The folder holds no such run, the configuration cannot be used, or it names another drafter.
    """
    run, document = Path(folder), "learner.yaml" if command == "learn" else "config.yaml"
    if not (run / document).is_file():
        raise ConfigError(f"--resume {folder}: there is no {document} in it; name the folder of an earlier run")
    if command != "train" and (run / TRAINING).is_file():
        raise ConfigError(
            f"--resume {folder} is the folder of a training; go on with aurora-rl train --resume, or serve its drafter "
            f"by drafter.path={run / 'drafter'}"
        )
    saved = run / document
    config = load_config(path or saved, overrides, usual, saved=saved if path and command == "train" else None)
    if config.run_dir is not None and os.path.realpath(config.run_dir) != os.path.realpath(folder):
        raise ConfigError(f"--resume {folder} and run_dir={config.run_dir} are two folders; leave run_dir out")
    _check_drafter(config, folder, saved, overrides)
    return replace(config, run_dir=folder)


def _check_drafter(config: Config, folder: str, saved: Path, overrides: Sequence[str]) -> None:
    """Raise ConfigError if another drafter is asked for than a run was started with, whose own it goes on with."""
    drafter = make_absolute(config).drafter
    values = {"drafter.path": drafter.path, "drafter.name": drafter.name}
    # A null that no pair sets is left out, or one of the many of a saved YAML file.
    asked = {key: value for key, value in values.items() if value is not None or pair_of(key, overrides)}
    before = make_absolute(load_config(saved)).drafter if asked else drafter
    for key, value in asked.items():
        was = before.path if key == "drafter.path" else before.name
        same_folder = key == "drafter.path" and value and was and os.path.realpath(value) == os.path.realpath(was)
        if value != was and not same_folder:
            raise ConfigError(
                f"--resume {folder}: it was started with {as_pair(key, was)} and goes on with its own drafter, and "
                f"this command has {as_pair(key, value)}; leave the key out, or start another run: leave --resume out "
                "and name a new run_dir"
            )


def refuse_training(folder: Path) -> None:
    """Raise ConfigError if a folder is that of a training, for commands that tell of a server's run."""
    if (folder / TRAINING).is_file():
        raise ConfigError(
            f"{folder} is the folder of a training, which serves nothing and publishes no versions; its figures are in "
            f"{folder / 'summary.json'} once it has ended, and in the events 'evaluation' of {folder / 'metrics.jsonl'}"
        )


def go_on(config: Config, run: Path) -> tuple[Config, list[str]]:
    """Return the configuration that starts from the drafter and the training states in the folder of a run.

    Returns:
        The configuration, and what is wrong with each training state, if there are some and none can be used. The
        learner then starts anew, from the drafter that was served last.
    """
    run = run.absolute()
    state, broken = newest_valid(run / "learner")
    # Rather what was served last than what was published last, which may not have passed its trial.
    events = [each for each in MetricsReader(run / "metrics.jsonl") if each["event"] in ("swap", "trial")]
    swaps = [run / "versions" / str(each["version"]) for each in events if each["event"] == "swap"]
    served = swaps[-1:] or ([run / "drafter-day0"] if events else [])
    published = sorted((run / "versions").glob("[0-9]*"), key=lambda folder: int(folder.name), reverse=True)
    states = [] if state is None else [state / "drafter"]
    drafters = [*served, *states, *published, run / "drafter", run / "drafter-day0"]
    if found := [drafter for drafter in drafters if (drafter / "config.json").is_file()]:
        config = replace(config, drafter=replace(config.drafter, path=str(found[0])))
    if state is None:
        return config, broken
    return replace(config, learner=replace(config.learner, resume=str(run / "learner"))), []


def write_traceback(error: Exception, run_dir: Path | str | None, command: str) -> Path:
    """Write a traceback into the run's folder, or into a temporary file where that cannot take it."""
    text = "".join(traceback.format_exception(error))
    path = Path(run_dir or tempfile.mkdtemp(prefix="aurora-rl-")) / f"{command}-traceback.txt"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:  # the run's folder is full, or gone
        path = Path(tempfile.mkdtemp(prefix="aurora-rl-")) / path.name
        path.write_text(text, encoding="utf-8")
    return path

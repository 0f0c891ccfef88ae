"""Processes of the command line on a tiny model, to be interrupted, killed and restarted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_commands import ForkedProcess, Forks
from loopback_ports import free_addresses
from processes import alive, wait

from aurora_rl.telemetry.log import MetricsReader


class Command:
    """A running `aurora-rl` and its run folder, which may be that of an earlier run to go on with."""

    process: subprocess.Popen[bytes] | ForkedProcess

    def __init__(
        self,
        folder: Path,
        command: str,
        pairs: list[str],
        resume: Path | None,
        forks: Forks | None,
        environment: dict[str, str],
    ) -> None:
        self.run, self.output = resume or folder / "run", folder / "output"
        self._reader, self._events = MetricsReader(self.run / "metrics.jsonl"), list[dict[str, Any]]()
        folder.mkdir()
        where = [f"run_dir={self.run}"] if resume is None else ["--resume", str(resume)]
        words = [*command.split(), *pairs, *where]
        with self.output.open("wb") as output:
            if forks is not None:
                self.process = forks.start(words, output, output)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "aurora_rl.cli.main", *words],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=os.environ | environment,
                )

    def events(self, kind: str) -> list[dict[str, Any]]:
        self._events += self._reader
        return [event for event in self._events if event["event"] == kind]

    def wait_for(self, kind: str, count: int = 1) -> list[dict[str, Any]]:
        def there() -> bool:
            assert self.process.poll() is None, self.text
            return len(self.events(kind)) >= count

        try:
            wait(there)
        except AssertionError:
            seen = Counter(event["event"] for event in self._events)
            pytest.fail(f"{count} of {kind!r} did not come in time; events {dict(seen)}, and it said: {self.text}")
        return self.events(kind)

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def ended(self, seconds: float = 60.0) -> int:
        return self.process.wait(seconds)

    @property
    def text(self) -> str:
        return self.output.read_text()

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.run / "summary.json").read_text())

    @property
    def children(self) -> list[int]:
        """Processes that have this one's id on their command line, which is how a learner knows its flywheel."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().split(b"\0")
            except OSError:  # ended since
                continue
            if b"--parent" in words and words[words.index(b"--parent") + 1] == str(self.process.pid).encode():
                found.append(int(path.parent.name))
        return [pid for pid in found if alive(pid)]


@pytest.fixture
def arguments(tiny_folder: Path) -> list[str]:
    """Short requests on the tiny model, a learner that publishes often, and a wire of the test's own."""
    trajectories, weights = free_addresses()
    return [
        *(
            f"model={tiny_folder}",
            "device=cpu",
            "dtype=float32",
            "drafter.vocab_size=64",
            "engine.slots=2",
        ),
        *("engine.max_length=256", "engine.threads=1", "learner.threads=1", "learner.nice=0", "max_new_tokens=8"),
        *("http.port=null", "drafter.adaptive=false"),  # rounds are measured where a test asks for it: 2 s a server
        *("learner.batch_size=2", "learner.publish_every=4", "gate.requests=3", "gate.margin=9"),
        *("canary.window=2", "canary.max_rounds=8"),  # too few pairs to prove anything: what is tried is promoted
        *(f"wire.trajectories={trajectories}", f"wire.weights={weights}"),
    ]


@pytest.fixture
def start(arguments: list[str], tmp_path: Path, forks: Forks) -> Iterator[Callable[..., Command]]:
    """Starts commands that share a wire: `start("learn", "key=value", ...)`. What is left at the end is killed.

    `resume` is the folder of a run to go on with; other names are variables of the environment. A command is forked,
    unless it is to be `fresh` or has such variables: then it has an interpreter of its own, and loads the library.
    """
    started: list[Command] = []

    def begin(command: str, *more: str, resume: Path | None = None, fresh: bool = False, **environment: str) -> Command:
        folder = tmp_path / f"{len(started)}-{command.split()[0]}"
        source = None if fresh or environment else forks
        started.append(Command(folder, command, [*arguments, *more], resume, source, environment))
        return started[-1]

    yield begin
    for command in started:
        for pid in command.children:
            os.kill(pid, signal.SIGKILL)
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()

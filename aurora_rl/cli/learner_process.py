"""The learner of a server, as a process of its own."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from aurora_rl.cli.config import Config, to_yaml
from aurora_rl.cli.errors import TEMPORARY, ConfigError
from aurora_rl.cli.restarts import LONGEST_WAIT_S, last_line, restart_wait
from aurora_rl.cli.run_dir import go_on
from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.telemetry.outputs import one_line

logger = logging.getLogger(__name__)

_READY_S = 300.0
_END_S = 60.0
_LOOK_S = 0.1


class LearnerProcess:
    """``aurora-rl learn`` in a session of its own, so that Ctrl-C reaches it through the server, in order.

    In the folder of the run its configuration goes to ``learner.yaml``, its output to ``learner.log``.

    Attributes:
        resumed: Whether it goes on from a training state.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self._config, self._run_dir, self._log = config, run_dir, run_dir / "learner.log"
        self._logged_before = self._log.stat().st_size if self._log.exists() else 0
        self.restarts, self._failures, self._due, self._started = 0, 0, 0.0, time.monotonic()
        self.resumed = config.learner.resume is not None
        self._obstacle, self._refused = "", False  # why it could not be started again; whether it was not ready in time
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="learner")
        self._plan: Future[tuple[Config, list[str]]] | None = None
        self.child = self._start(config)

    def _start(self, config: Config) -> subprocess.Popen:
        path = self._run_dir / "learner.yaml"
        path.write_text(to_yaml(config, run_dir=False), encoding="utf-8")
        # -P: a file in the working directory, such as profile.py, must not take the place of an installed module. A
        # parent that imports from there first itself, as under python -m, shares its modules with the learner.
        safe = [] if sys.path[0] in ("", os.getcwd()) else ["-P"]
        command = [sys.executable, *safe, "-m", "aurora_rl.cli.main", "learn", "--config", str(path)]
        self._started = time.monotonic()
        with open(self._log, "ab") as output:
            return subprocess.Popen(
                [*command, "--parent", str(os.getpid()), f"run_dir={self._run_dir}"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def tend(self) -> bool:
        """Start the learner again if it died, from its last training state; return whether that was done.

        It waits before each start: a second the first time, then twice as long each time, up to a minute. Once a
        learner has lived for longer than a minute, its end counts as the first. A start that fails, as without memory
        or without the run's folder, counts as a learner that died at once.
        """
        now = time.monotonic()
        if self.child.poll() is None:
            if now - self._started > LONGEST_WAIT_S:
                self._failures = 0
            self._due = 0.0
            return False
        if not self._due:
            self._due = now + restart_wait(self._failures)
            self._failures += 1
        if now < self._due:
            return False
        # It reads every byte of the training state, while requests are served.
        plan = self._plan = self._plan or self._worker.submit(go_on, self._config, self._run_dir)
        if not wait([plan], _LOOK_S).done:
            return False
        self._due, self._plan = 0.0, None
        try:
            config, broken = plan.result()
            if broken:
                path, faults = config.drafter.path, "; ".join(broken)
                logger.warning("the learner starts anew from %s, as no training state can be used: %s", path, faults)
            self.child = self._start(config)
        except (OSError, ValueError) as error:
            if not self._obstacle:
                logger.warning("the learner cannot be started again, serving goes on without it: %s", one_line(error))
            self._obstacle = one_line(error)
            return False
        self.restarts, self.resumed, self._obstacle = self.restarts + 1, config.learner.resume is not None, ""
        return True

    def wait_ready(self, events: MetricsReader) -> None:
        """Wait until the learner listens, so that a configuration that it refuses is told before a request is served.

        Raises:
            ConfigError: The learner ended, or it does not listen within five minutes; quotes its last line.
        """
        deadline = time.monotonic() + _READY_S
        while not any(event["event"] == "learner_ready" for event in events):
            if self.child.poll() is not None or time.monotonic() > deadline:
                self._refused, passes = True, self.child.poll() in (None, TEMPORARY)
                reason = TimeoutError("the learner may start another time") if passes else None
                raise ConfigError(f"the learner did not start: {last_line(self._log)}") from reason
            time.sleep(0.05)

    @property
    def state(self) -> str:
        """Say that the learner runs, or that it died."""
        if self.child.poll() is None:
            return "running"
        reason = f" and cannot be started again ({self._obstacle})" if self._obstacle else ""
        return f"died with status {self.child.returncode}{reason}, serving goes on; see {self._log}"

    def end(self) -> str | None:
        """End the learner. Return what went wrong with its end; an earlier death was told already."""
        if self.child.poll() is not None and (self._due or self._obstacle or self._refused):
            return None
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGTERM)
            try:
                self.child.wait(timeout=_END_S)
            except subprocess.TimeoutExpired:
                self.child.kill()
                self.child.wait()
                return f"the learner did not end within {_END_S:.0f} s and was killed; see {self._log}"
        # All but the first had not begun to learn; the last was loading a library that ends by KeyboardInterrupt.
        if self.child.returncode in (0, 130, -signal.SIGTERM, -signal.SIGINT):
            return None
        return f"the learner ended with status {self.child.returncode}: {last_line(self._log)}; see {self._log}"

    def withdraw(self) -> None:
        """End the learner of a run that is refused. Its log stays if it had ended by itself, which may say why."""
        ended_itself = self.child.poll() is not None
        self.end()
        if not ended_itself:
            os.truncate(self._log, self._logged_before)

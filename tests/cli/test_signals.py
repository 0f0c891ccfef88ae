"""What a command does about SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from aurora_rl.cli.signals import Stop


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_signals_raise_once_while_starting() -> None:
    stop = Stop()
    with pytest.raises(KeyboardInterrupt):
        interrupt()
    interrupt()
    assert stop.requested


def test_signals_are_held_while_a_child_is_made() -> None:
    stop, after = Stop(), []
    with pytest.raises(KeyboardInterrupt), stop.held():
        interrupt()
        after.append("made")
    assert after == ["made"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_are_noted_while_working_and_a_second_one_raises(name: str) -> None:
    code = f"""
import signal
from aurora_rl.cli.signals import Stop
signal.signal(signal.{name}, signal.SIG_DFL)  # whoever started the tests may have had it ignored
stop = Stop()
stop.working = True
signal.raise_signal(signal.{name})
print("noted" if stop.requested else "lost")
try:
    signal.raise_signal(signal.{name})
except KeyboardInterrupt:
    print("raised")
"""
    # In a process of its own, which a signal that nobody handles may end.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "noted\nraised\n", "")


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # and where it is taken nevertheless, it only sets a flag
    stop = Stop()
    stop.working = True
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.requested


def test_signals_do_nothing_while_ending() -> None:
    stop = Stop()
    stop.ignore()
    interrupt()
    assert not stop.requested

"""Handling of SIGINT, SIGTERM and SIGHUP by a command."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Stop:
    """Handling of SIGINT, SIGTERM and SIGHUP.

    While a command starts they raise KeyboardInterrupt. Once it works, the first is a flag that loops look at, so that
    a round or a step ends whole, and a second one raises. However many come, one exception is raised.

    Attributes:
        requested: Whether the user asked for an end.
        working: Set by the command when it has started.
    """

    def __init__(self) -> None:
        self.requested, self.working = False, False
        self._raised, self._held = False, False
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            self._numbers.append(signal.SIGHUP)
        for number in self._numbers:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """Ignore signals up to the end of the process: what is left to do is short and must be completed."""
        for number in self._numbers:
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if (again or not self.working) and not self._held:
            self._raise()

    def _raise(self) -> None:
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Defer KeyboardInterrupt until the block exits: a child process whose handle is lost could not be ended."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.requested:
            self._raise()


def end_with(parent: int) -> None:
    """Have this process get SIGTERM once the one that started it is gone, however that went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()

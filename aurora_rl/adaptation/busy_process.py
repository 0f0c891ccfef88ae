"""A learner that is always busy, in a process next to a measurement: the most that learning can cost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Self

from aurora_rl.memory import importing


class BusyProcess:
    """A child process that repeats a task, and is stopped except where it is to run.

    Args:
        begin: Called in the child; returns what is repeated there.
        arguments: Arguments of ``begin``, which like it can be pickled.

    Raises:
        RuntimeError: On entering: the child ended before it was ready.
    """

    def __init__(self, begin: Callable[..., Callable[[], object]], *arguments: object) -> None:
        context = multiprocessing.get_context("spawn")
        self._ready, end = context.Pipe(duplex=False)
        work = pickle.dumps((begin, arguments))
        self._process = context.Process(target=_repeat, args=(end, work), daemon=True)
        self._end = end

    def __enter__(self) -> Self:
        """Start the child, wait until it works, and stop it."""
        self._process.start()
        self._end.close()
        try:
            self._ready.recv()
        except EOFError:
            raise RuntimeError("the process next to the measurement ended before it was ready; see above") from None
        self._signal(signal.SIGSTOP)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let it run in the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def _repeat(ready: Connection, work: bytes) -> None:
    with importing():  # the module of `begin`
        begin, arguments = pickle.loads(work)
    task = begin(*arguments)
    task()
    os.nice(19)  # not while it loads: the measurement waits for that, on a busy machine for minutes
    ready.send(True)
    while True:
        task()

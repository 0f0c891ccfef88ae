"""How far a long part of a command is."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from aurora_rl.telemetry.view import every

_LINE_S = 15.0


class Watch:
    """Shows what is done and how long the rest will take: a bar in a terminal, a line at times elsewhere.

    Args:
        console: Console to show it on.
        what: Name of the work.
        total: Units of the work.
        done: Units that were done before.
        bar: Bar of the terminal.
    """

    def __init__(self, console: Console, what: str, total: int, done: int, bar: Progress) -> None:
        self._console, self._what, self._total, self._bar = console, what, total, bar
        self._task = bar.add_task(what, total=total, completed=done)
        self._began, self._before = time.monotonic(), done
        self._line = ""
        self._print = every(_LINE_S, lambda: console.print(self._line, soft_wrap=True))

    def tell(self, done: int, text: str = "") -> None:
        """Note how many units are done by now, and what else there is to say."""
        self._bar.update(self._task, completed=done, description=f"{self._what} {text}")
        if not self._console.is_terminal:
            left = (time.monotonic() - self._began) / max(done - self._before, 1) * (self._total - done)
            self._line = f"{self._what} {done}/{self._total}{text and f', {text}'}, {left:.0f} s left"
            self._print()


@contextlib.contextmanager
def watch(console: Console, what: str, total: int, done: int) -> Iterator[Watch]:
    """Show a part of the work until the block ends; arguments as of :class:`Watch`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Watch(console, what, total, done, bar)

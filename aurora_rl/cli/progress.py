"""Progress of a long part of a command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from aurora_rl.telemetry.view import every


class Watch:
    """Shows how many units of ``total`` are done and how long the rest will take.

    A terminal has the bar, another console a line at times. ``done`` units were done before.
    """

    def __init__(self, console: Console, what: str, total: int, done: int, bar: Progress) -> None:
        self._console, self._what, self._total, self._bar = console, what, total, bar
        self._task = bar.add_task(what, total=total, completed=done)
        self._began, self._before = time.monotonic(), done
        self._line = ""
        self._print = every(15.0, lambda: console.print(self._line, soft_wrap=True))

    def tell(self, done: int, text: str = "") -> None:
        """Note how many units are done by now, and what else there is to say."""
        self._bar.update(self._task, completed=done, description=f"{self._what} {text}")
        if not self._console.is_terminal:
            left = (time.monotonic() - self._began) / max(done - self._before, 1) * (self._total - done)
            self._line = f"{self._what} {done}/{self._total}{text and f', {text}'}, {left:.0f} s left"
            self._print()


@contextlib.contextmanager
def watch(console: Console, what: str, total: int, done: int) -> Iterator[Watch]:
    """Show a part of the work until the block ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        yield Watch(console, what, total, done, bar)


@contextlib.contextmanager
def timed_steps(console: Console) -> Iterator[Callable[[str], None]]:
    """Show the steps of a start and what each of them took: a terminal has one line of all, others a line of each.

    Yields:
        A function to call with the name of each step as it begins.

    Example:
        >>> with timed_steps(Console()) as step:
        ...     step("model")
        ...     step("engine")
        model 0.0 s
        engine 0.0 s
    """
    done: list[str] = []
    name, began = "", time.monotonic()

    def end() -> None:
        if name:
            done.append(f"{name} {time.monotonic() - began:.1f} s")
            if not console.is_terminal:
                console.print(done[-1], soft_wrap=True)

    with Live(console=console, auto_refresh=False, transient=True) as live:

        def step(following: str) -> None:
            nonlocal name, began
            end()
            name, began = following, time.monotonic()
            if console.is_terminal:
                live.update(Text(" · ".join([*done, f"{name} …"])), refresh=True)

        yield step
    end()
    if console.is_terminal:
        console.print(" · ".join(done), soft_wrap=True)

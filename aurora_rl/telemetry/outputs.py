"""Outputs of a run: a failure is reported, and loses no other output."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable

from aurora_rl.telemetry.log import JsonLines, MetricsLog

logger = logging.getLogger(__name__)


def one_line(error: Exception) -> str:
    """Return the message of an error on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    return " ".join(text.split())


class Outputs:
    """Write the outputs of a process, each whatever became of the others.

    Args:
        log: Gets an event "not_written" for each failure, and the first is warned of; None for the end of a run, which
            reports `failures` itself.

    Attributes:
        failures: By output, a line for the user: what could not be written, and why.

    Example:
        >>> outputs = Outputs()
        >>> def full() -> None:
        ...     raise OSError("the disk is full")
        >>> outputs.write("summary.json", full), outputs.failures
        (False, {'summary.json': 'summary.json could not be written: the disk is full'})
    """

    def __init__(self, log: MetricsLog | None = None) -> None:
        self.failures: dict[str, str] = {}
        self._log, self._times = log, Counter[str]()

    def write(self, name: str, write: Callable[[], None]) -> bool:
        """Call ``write``, which writes the output ``name``. False if it failed."""
        try:
            write()
        except Exception as error:  # whatever it is, the other outputs are not lost for it
            reason = one_line(error) or repr(error)
            if self._log is not None:
                self._log.write("not_written", what=name, reason=reason)
                if not self._times:
                    logger.warning("%s was not written, and the run goes on: %s", name, reason)
            self._times[name] += 1
            times = f" ({self._times[name]} times)" if self._times[name] > 1 else ""
            self.failures[name] = f"{name} could not be written{times}: {reason}"
            return False
        return True

    def count(self, lines: JsonLines) -> None:
        """Note the lines that a file has lost."""
        if lines.lost:
            self.failures[str(lines.path)] = f"{lines.path} lacks {lines.lost} lines that could not be written"

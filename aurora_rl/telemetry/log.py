"""The run's log: one JSON object a line, appended by both processes, read by whatever shows the run."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class JsonLines:
    """Append JSON objects to a file, one a line.

    Every line is one write to a file opened for appending, so two processes can share the file. What cannot be written,
    as on a full disk, is lost and counted: a log is no reason to stop serving.

    Args:
        path: File; created where it is missing.

    Attributes:
        path: File.
        lost: Lines that could not be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        self.path, self.lost = path, 0
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # whoever wrote it was killed within a line
            os.write(self._file, b"\n")

    def append(self, **fields: Any) -> None:
        """Append one line; ``fields`` are JSON values."""
        line = (json.dumps(fields) + "\n").encode()
        try:
            whole, reason = os.write(self._file, line) == len(line), ""
        except OSError as error:
            whole, reason = False, f": {error.strerror}"
        if not whole:
            if not self.lost:
                logger.warning("%s cannot be written (later lines are lost without a word)%s", self.path, reason)
            self.lost += 1


class MetricsLog(JsonLines):
    """Append events to ``metrics.jsonl``.

    Args:
        path: File; see :class:`JsonLines`.
        source: Name of the process, written into each line.
    """

    def __init__(self, path: Path, source: str) -> None:
        super().__init__(path)
        self._source = source

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; ``fields`` are JSON values."""
        self.append(time=round(time.time(), 3), source=self._source, event=event, **fields)


class MetricsReader:
    """Follow a metrics file.

    Args:
        path: File; it may not exist yet.
        from_now: Leave out the events that are there already, as of an earlier part of the run.
    """

    def __init__(self, path: str | os.PathLike[str], *, from_now: bool = False) -> None:
        self._path = Path(path)
        self._offset = self._path.stat().st_size if from_now and self._path.exists() else 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the events since the last one that was read. One line of the file is in memory at a time.

        A line still being written waits for the next call, a broken one is left out. A file that cannot be opened, as
        when the process has no descriptor left, has nothing new: showing a run is no reason to end it.
        """
        try:
            file = open(self._path, "rb")
        except OSError:
            return
        with file:
            if os.fstat(file.fileno()).st_size < self._offset:  # cut, as by a rotation that copies and truncates
                self._offset = 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                try:
                    event = json.loads(line)
                except ValueError:  # a full disk cuts lines
                    continue
                yield event

"""The run's log: one JSON object a line, appended by both processes, read by the live view and the report."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


class MetricsLog:
    """Append events to ``metrics.jsonl``.

    Every line is one write to a file opened for appending, so two processes can share the file. What cannot be written,
    as on a full disk, is lost and counted: a log is no reason to stop serving.

    Args:
        path: the file; created where it is missing.
        source: name of the process, written into each line.

    Attributes:
        lost: events that could not be written.
    """

    def __init__(self, path: str | os.PathLike[str], source: str) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._source, self.lost = source, 0

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; ``fields`` are JSON values."""
        line = json.dumps({"time": round(time.time(), 3), "source": self._source, "event": event, **fields})
        try:
            os.write(self._file, (line + "\n").encode())
        except OSError as error:
            if not self.lost:
                logger.warning("metrics cannot be written (later ones are lost without a word): %s", error.strerror)
            self.lost += 1

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class MetricsReader:
    """Follow a metrics file.

    Args:
        path: the file; it may not exist yet.
        at_end: skip what it holds now.
    """

    def __init__(self, path: str | os.PathLike[str], *, at_end: bool = False) -> None:
        self._path = path = Path(path)
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def new(self) -> list[dict[str, Any]]:
        """Events since the last call. A line still being written waits for the next one, a broken one is left out."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._offset += end
        events = []
        for line in data[:end].splitlines():
            with contextlib.suppress(ValueError):  # a full disk cuts lines
                events.append(json.loads(line))
        return events

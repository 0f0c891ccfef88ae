"""The run's log: one JSON object a line, appended by both processes, read by the live view and the report."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class MetricsLog:
    """Append events to ``metrics.jsonl``.

    Every line is one write to a file opened for appending, so two processes can share the file.

    Args:
        path: the file; created where it is missing.
        source: name of the process, written into each line.
    """

    def __init__(self, path: Path, source: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._source = source

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; ``fields`` are JSON values."""
        line = json.dumps({"time": round(time.time(), 3), "source": self._source, "event": event, **fields})
        os.write(self._file, (line + "\n").encode())

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class MetricsReader:
    """Follow a metrics file from its beginning.

    Args:
        path: the file; it may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Events written since the last call; a line still being written waits for the next."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            yield json.loads(line)

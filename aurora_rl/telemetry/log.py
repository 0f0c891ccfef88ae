"""The run's log: one JSON object a line, appended by both processes, read by whatever shows the run."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

logger = logging.getLogger(__name__)


class JsonLines:
    """Append JSON objects to a file, one a line.

    Every line is one write to a file opened for appending, so two processes can share the file. What cannot be written,
    as on a full disk, is lost and counted: a log is no reason to stop serving.

    Args:
        path: File; created where it is missing.
        max_bytes: Size from which the file replaces ``older_part(path)`` and is begun anew; None lets it
            grow.

    Attributes:
        path: File.
        lost: Lines that could not be written.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        self.path, self.lost, self._max_bytes = Path(path), 0, max_bytes
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # whoever wrote it was killed within a line
            os.write(self._file, b"\n")

    def _open(self) -> int:
        return os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, **fields: Any) -> None:
        """Append one line; ``fields`` are JSON values."""
        line = (json.dumps(fields) + "\n").encode()
        try:
            if self._max_bytes is not None:
                self._rotate(self._max_bytes - len(line))
            whole, reason = os.write(self._file, line) == len(line), ""
        except OSError as error:
            whole, reason = False, f": {error.strerror}"
        finally:
            if self._max_bytes is not None:
                with contextlib.suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)
        if not whole:
            if not self.lost:
                logger.warning("%s cannot be written (later lines are lost without a word)%s", self.path, reason)
            self.lost += 1

    def _rotate(self, room_from: int) -> None:
        """Lock the file that is at the path now, begun anew if it has more than ``room_from`` bytes."""
        while True:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            own = os.fstat(self._file)
            if not self.path.exists() or self.path.stat().st_ino != own.st_ino:
                pass  # another process was here first
            elif 0 < own.st_size > room_from:
                self.path.replace(older_part(self.path))
            else:
                return
            try:
                new = self._open()
            except FileNotFoundError:  # the folder is gone, and the file goes on without a name
                return
            os.close(self._file)  # and with it the lock
            self._file = new


class MetricsLog(JsonLines):
    """Append events to ``metrics.jsonl``.

    Args:
        path: File; see :class:`JsonLines`.
        source: Name of the process, written into each line.
        max_bytes: See :class:`JsonLines`.
    """

    def __init__(self, path: str | os.PathLike[str], source: str, max_bytes: int | None = None) -> None:
        super().__init__(path, max_bytes)
        self._source = source

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; ``fields`` are JSON values."""
        self.append(time=round(time.time(), 3), source=self._source, event=event, **fields)


class MetricsReader:
    """Follow a metrics file, and its older part.

    Args:
        path: File; it may not exist yet.
        from_now: Leave out the events that are there already, as of an earlier part of the run.
    """

    def __init__(self, path: str | os.PathLike[str], *, from_now: bool = False) -> None:
        self._path = Path(path)
        self._offset, self._inode = 0, 0  # position in the file being read, and its inode
        self._held: int | None = None  # a descriptor of it, so that its number is not given to another file
        if from_now and self._path.exists():
            with open(self._path, "rb") as file:
                there = os.fstat(file.fileno())
                self._offset, self._inode = there.st_size, there.st_ino
                self._hold(file)

    def _hold(self, file: IO[bytes]) -> None:
        with contextlib.suppress(OSError):
            held, self._held = self._held, os.dup(file.fileno())
            if held is not None:
                os.close(held)

    def __del__(self) -> None:
        if self._held is not None:
            os.close(self._held)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Read the events since the last one that was read. One line of the file is in memory at a time.

        A line still being written waits for the next call, a broken one is left out. A file that cannot be opened, as
        when the process has no descriptor left, has nothing new: showing a run is no reason to end it.
        """
        with contextlib.ExitStack() as opened:
            files = self._open(opened)
            current = os.fstat(files[0].fileno()).st_ino if files else 0
            for file in reversed(files):
                there = os.fstat(file.fileno())
                if there.st_ino != self._inode:
                    if there.st_ino != current == self._inode:
                        continue  # older than what was read
                    self._inode, self._offset = there.st_ino, 0
                    self._hold(file)
                if there.st_size < self._offset:  # cut, as by a rotation that copies and truncates
                    self._offset = 0
                file.seek(self._offset)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    self._offset += len(line)
                    try:
                        event = json.loads(line)
                    except ValueError:  # a full disk cuts lines
                        continue
                    yield event

    def _open(self, opened: contextlib.ExitStack) -> list[BinaryIO]:
        """Open the file and the one before it, in this order: what is begun anew meanwhile is in both.

        Begun anew twice meanwhile, the second would be newer than the first, and both are opened again.
        """
        while True:
            files: list[BinaryIO] = []
            for path in (self._path, older_part(self._path)):
                with contextlib.suppress(OSError):
                    files.append(opened.enter_context(open(path, "rb")))
            numbers = [os.fstat(file.fileno()).st_ino for file in files]
            if len(set(numbers)) < 2:
                return files
            with contextlib.suppress(OSError):
                if os.stat(self._path).st_ino == numbers[0]:
                    return files
            opened.close()


def older_part(path: str | os.PathLike[str]) -> Path:
    """Return where the lines before those of a file are.

    >>> older_part("run/metrics.jsonl").name
    'metrics.1.jsonl'
    """
    path = Path(path)
    return path.with_name(f"{path.stem}.1{path.suffix}")

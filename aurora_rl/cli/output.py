"""Standard output and error that no terminal, encoding or closed pipe turns into an error of the program."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any, TextIO

from rich.console import Console

_TREND = dict(zip("▁▂▃▄▅▆▇█", "_.:-=+*#", strict=True))
_PLAIN = str.maketrans({"–": "-", "—": "-", "·": "/", "→": "->", "…": "...", "’": "'", "“": '"', "”": '"'} | _TREND)


class SafeStream:
    r"""A text stream whose writes always succeed.

    Characters that its encoding lacks are replaced by plain ones. If the stream can no longer be written, as when the
    reader of a pipe has ended, the rest is lost. Showing a run is no reason to end it.

    Example:
        >>> import io
        >>> raw = io.BytesIO()
        >>> stream = SafeStream(io.TextIOWrapper(raw, "ascii"))
        >>> print("1.0 → 2.0 · é", file=stream, flush=True)
        >>> raw.getvalue()
        b'1.0 -> 2.0 / ?\n'
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written; returns the number of characters of ``text``."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.translate(_PLAIN).encode(encoding, "replace").decode(encoding))
        except OSError:
            self._give_up()
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def _give_up(self) -> None:
        """Point the stream's file at nothing: what it still buffers would fail again when the interpreter ends."""
        with contextlib.suppress(io.UnsupportedOperation):
            descriptor, nothing = self._stream.fileno(), os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, descriptor)
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def plain_console() -> Console:
    """Return a console that shows text as it is: names, paths and peers' messages may look like Rich's markup."""
    return Console(markup=False, emoji=False)

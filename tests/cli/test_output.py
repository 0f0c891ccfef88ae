from __future__ import annotations

import io
import os

import pytest

from aurora_rl.cli.output import SafeStream
from aurora_rl.telemetry.view import trend


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("ascii", "1 -> 2 / ?"), ("latin-1", "1 -> 2 / é"), ("utf-8", "1 → 2 · é")],
)
def test_characters_that_an_encoding_lacks_are_plain(encoding: str, text: str) -> None:
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding))
    print("1 → 2 · é", file=stream, end="", flush=True)
    assert raw.getvalue().decode(encoding) == text


def test_a_trend_is_plain_where_there_are_no_blocks() -> None:
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, "latin-1"))
    print(trend([1, 2, 3, 4, 5, 6, 7, 8]), file=stream, end="", flush=True)
    assert raw.getvalue() == b"_.:-=+*# 1.00-8.00"


def test_a_pipe_without_a_reader_is_no_error() -> None:
    reader, writer = os.pipe()
    with open(writer, "w") as file:
        os.close(reader)
        for _ in range(2):
            print("lost", file=SafeStream(file), flush=True)
    # And closing the file, which flushes what it holds, raised nothing.

"""What the conformance checks assert with."""

from __future__ import annotations


def require(condition: bool, message: str) -> None:
    """An assertion that ``python -O`` keeps."""
    if not condition:
        raise AssertionError(message)

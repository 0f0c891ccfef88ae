"""Errors of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the fix."""


@contextmanager
def naming(name: str, kinds: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """Turn an error of the block into a ConfigError whose message begins with ``name``."""
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{name}: {error}") from error

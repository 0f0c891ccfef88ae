"""Errors of a configuration."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

TEMPORARY = getattr(os, "EX_TEMPFAIL", 75)
"""Exit status after what may pass by itself, so that a service manager may try again."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key, the value and the fix."""


def may_pass(error: BaseException | None) -> bool:
    """Return whether an error, or what it comes from, may pass by itself: a port in use, a hub that is out of reach.

    Example:
        >>> may_pass(ConfigError("seed=-1")), may_pass(TimeoutError("not yet"))
        (False, True)
    """
    while error is not None:
        # The last is huggingface_hub's: it asked nobody, or nobody answered. To import it takes long.
        lost = isinstance(error, (ConnectionError, TimeoutError, socket.gaierror))
        if lost or type(error).__name__ == "LocalEntryNotFoundError":
            return True
        if isinstance(error, OSError) and error.errno in (errno.EADDRINUSE, errno.ENETUNREACH, errno.EHOSTUNREACH):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming(name: str, kinds: type[Exception] | tuple[type[Exception], ...] = ValueError) -> Iterator[None]:
    """Turn an error of the block into a ConfigError whose message begins with ``name``."""
    try:
        yield
    except kinds as error:
        raise ConfigError(f"{name}: {error}") from error

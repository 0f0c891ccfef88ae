"""Ports for servers that a test starts later, or again at the same address."""

from __future__ import annotations

import contextlib
import random
import socket

# Below those that Linux gives out by itself: one of these may be taken between the choice and the server's start.
_FIRST, _LAST = 20_000, 32_000


def free_ports(count: int = 1) -> list[int]:
    """Return ports of loopback that are free and follow each other."""
    while True:
        first = random.SystemRandom().randrange(_FIRST, _LAST)
        with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
            for port in range(first, first + count):
                opened.enter_context(socket.create_server(("127.0.0.1", port)))
            return list(range(first, first + count))


def free_addresses() -> list[str]:
    """Return two addresses, for the two halves of the wire."""
    return [f"tcp://127.0.0.1:{port}" for port in free_ports(2)]

"""Addresses of the wire: which of them only this host can reach."""

from __future__ import annotations

import re


def is_local(address: str) -> bool:
    """Return whether only this host can reach an address of ZeroMQ.

    Example:
        >>> [is_local(each) for each in ("tcp://127.0.0.1:5557", "tcp://localhost:5557", "ipc:///tmp/wire")]
        [True, True, True]
        >>> is_local("tcp://0.0.0.0:5557"), is_local("tcp://learner:5557")
        (False, False)
    """
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    return address.startswith("ipc://") or bool(re.fullmatch(r"localhost|127(\.\d{1,3}){3}|::1", host))

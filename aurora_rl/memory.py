"""Return memory that the C library holds and nothing in the process uses."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Callable

_trim: Callable[[int], int] | None = None
with contextlib.suppress(AttributeError, OSError, TypeError):  # raised where the C library is not glibc
    _trim = ctypes.CDLL(None).malloc_trim


def return_freed_memory(*, collect: bool = False) -> None:
    """Give the pages of freed memory back to the system, in some milliseconds for each 100 MB; needs glibc.

    glibc keeps freed tensors of up to 32 MB for later ones. The holes that they leave seldom fit, as no two batches
    have the same number of rows: a learner held 400 MB of them after a few steps.

    Args:
        collect: Whether to find objects first that only refer to each other, as a model's modules do.
    """
    if collect:
        gc.collect()
    if _trim is not None:
        _trim(0)

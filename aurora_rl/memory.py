"""Return memory that the C library holds and nothing in the process uses."""

from __future__ import annotations

import ctypes
import gc
import sys

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none


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

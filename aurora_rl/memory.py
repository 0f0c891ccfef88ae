"""Return memory that the C library holds and nothing in the process uses; look for garbage only where some can be."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator

_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none


def return_freed_memory(*, collect: bool = False) -> None:
    """Give the pages of freed memory back to the system, in some milliseconds for each 100 MB; needs glibc.

    glibc keeps freed tensors of up to 32 MB for later ones, which seldom fit. ``collect`` finds objects first that only
    refer to each other, as a model's modules do.
    """
    if collect:
        gc.collect()
    if _trim is not None:
        _trim(0)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Exempt what is imported in the block from Python's search for garbage, if the block imports torch first.

    torch, transformers and torchrl make a million objects that live as long as the process. Searches among them would
    take a fifth of the time of their import.

    Example:
        >>> with importing():
        ...     import torch
    """
    if "torch" in sys.modules:  # main() was called in a process that has objects of its own
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # or Triton's bindings print what they take for leaks, at the very end
        gc.enable()

"""How rows of logits are walked: in chunks that a matrix product fills, and in blocks that stay in a CPU's cache."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

Rows = slice | Tensor
"""Rows of a chunk: a slice, or their numbers ``[r]`` int64."""

# Logits of a chunk. A product of fewer rows reads its weights too often; more rows take more memory.
_CHUNK = {"cpu": 2**21, "cuda": 2**27}
# Logits of a block: a few tensors of its size fit into the second-level cache of a CPU's core.
_BLOCK = {"cpu": 2**17, "cuda": 2**25}
_FEWEST, _ENOUGH = 128, 256  # rows of a chunk, whatever the vocabulary: with fewer of these a product is slow
_LOG2_E = math.log2(math.e)


def chunk_rows(device: torch.device, vocab_size: int, count: int) -> int:
    """Return the rows of a chunk for ``count`` rows: chunks are even, since small products are slow.

    Example:
        >>> [chunk_rows(torch.device("cpu"), 8192, count) for count in (100, 400, 1024)]
        [100, 400, 256]
    """
    # A sixth of the rows keeps the memory of a chunk below a tenth of what whole logits take.
    fewest = min(max(count // 6, _FEWEST), _ENOUGH)
    usual = max(_CHUNK.get(device.type, _CHUNK["cuda"]) // vocab_size, fewest)
    return max(math.ceil(count / max(count // usual, 1)), 1)


def blocks(logits: Tensor) -> Iterator[slice]:
    """Split the rows of a chunk ``[r, V]`` into blocks.

    Example:
        >>> logits = torch.zeros(300, 5000)
        >>> sum(len(logits[rows]) for rows in blocks(logits))
        300
    """
    count, width = logits.shape
    threads = torch.get_num_threads() if logits.device.type == "cpu" else 1
    size = max(threads * _BLOCK.get(logits.device.type, _BLOCK["cuda"]) // max(width, 1), threads)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def agreeing(logits: Tensor, chosen: Tensor) -> Tensor:
    """Return whether a chosen column ``[r]`` has the largest logit of its row of ``[r, Vd]``; −1 has not, ``[r]`` bool.

    The argmax would take several times longer.

    Example:
        >>> agreeing(torch.tensor([[0.0, 2.0], [0.0, 2.0], [0.0, 2.0]]), torch.tensor([0, 1, -1]))
        tensor([False,  True, False])
    """
    return (logits.gather(1, chosen.clamp(min=0)[:, None])[:, 0] >= logits.amax(-1)) & (chosen >= 0)


def exp(values: Tensor) -> Tensor:
    """Return e to the values, by a power of 2, which a CPU computes in half the time of ``torch.exp``.

    Values below 0 have the relative error of their product with log2 e, ``|x| ε``.
    """
    return (values * _LOG2_E).exp2_()


def exp_(values: Tensor) -> Tensor:
    """Overwrite values by e to them, see :func:`exp`."""
    return values.mul_(_LOG2_E).exp2_()


def log_softmax(logits: Tensor) -> Tensor:
    """Return the log-softmax over the last dimension in float32, or in float64 of a float64 input."""
    return logits.log_softmax(-1, dtype=row_dtype(logits.dtype))


def row_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of log-probabilities and values: float32, or float64 of float64 logits."""
    return torch.promote_types(dtype, torch.float32)


def product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which logits are multiplied: the weight's, or autocast's where that is on."""
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype

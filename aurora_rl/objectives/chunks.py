"""Chunks of rows of the drafter's logits, computed again in the backward pass instead of being kept.

Legend: ``X`` rows, ``c`` of a chunk, ``H`` hidden size, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aurora_kernels.rows import product_dtype, row_dtype
from aurora_rl.policies.head_logits import HeadLogits, multiply


def rows_and_head(logits: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return what logits are made of: rows, and a function that makes logits ``[..., Vd]`` of some of them.

    Args:
        logits: The drafter's logits, ``[X, Vd]``. For :class:`~aurora_rl.policies.HeadLogits` the rows are their states
            ``[X, H]``, and no product is made here. If there are several heads, rows have one column more, the number
            of their head. For plain logits, the rows are the logits themselves.

    Example:
        >>> rows, head = rows_and_head(HeadLogits(torch.ones(5, 3), torch.ones(4, 3)))
        >>> rows.shape, head(rows[:2])
        (torch.Size([5, 3]), tensor([[3., 3., 3., 3.],
                [3., 3., 3., 3.]]))
    """
    if not isinstance(logits, HeadLogits):
        return logits, lambda rows: rows
    dtype = product_dtype(logits.weights[0])
    # A head's gradient is a sum over chunks, in float32 at least.
    weights = [weight.to(row_dtype(weight.dtype)) for weight in logits.weights]
    if logits.head_of is None:
        return logits.states, lambda rows: F.linear(rows.to(dtype), weights[0].to(dtype))

    def product(rows: Tensor) -> Tensor:
        return multiply(rows[:, :-1].to(dtype), [weight.to(dtype) for weight in weights], rows[:, -1].long())

    return torch.cat([logits.states, logits.head_of[:, None].to(logits.states.dtype)], 1), product


def by_chunks(function: Callable[..., tuple[Tensor, ...]], chunks: Iterable[tuple[Any, ...]]) -> tuple[Tensor, ...]:
    """Call a function on every chunk and concatenate the results along their last dimension.

    What a call computes is freed after it. The backward pass calls the function again, a chunk at a time, up to the
    last operation that has a gradient. It draws the same random numbers again.

    Args:
        function: Function that returns a tuple of tensors, the same ones when it is called again. It may draw random
            numbers from PyTorch's default generators.
        chunks: Positional arguments of each call, at least one.

    Example:
        >>> x = torch.ones(2, 3, requires_grad=True)
        >>> (y,) = by_chunks(lambda part: (part.exp().sum(0),), [(part,) for part in x.split(2, dim=1)])
        >>> y.shape, torch.autograd.grad(y.sum(), x)[0].shape
        (torch.Size([3]), torch.Size([2, 3]))
    """
    parts = [checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks]
    return tuple(torch.cat(each, dim=-1) for each in zip(*parts, strict=True))

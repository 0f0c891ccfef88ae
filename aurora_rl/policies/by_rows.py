"""A function of rows, called for some of them at a time, whose backward pass keeps nothing of a call but its inputs.

``torch.utils.checkpoint`` on each call would compute the same with more memory. Results that outlive their calls would
lie between freed blocks, so that the C library could not use it again. And the gradient of each slice would be whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from typing_extensions import override


def by_rows(
    function: Callable[..., Tensor],
    size: int,
    rows: Sequence[Tensor],
    shared: Sequence[Tensor],
    parameters: Sequence[Tensor],
) -> Tensor:
    """Call a function for ``size`` rows at a time, and once more for each in the backward pass.

    Args:
        function: Called with a slice, the rows in it of each of ``rows``, and ``shared``. It returns ``[b, t, ...]``
            for ``t`` rows, and must return the same when it is called again. Context variables, such as the adapters
            of the rows, are then what they are now.
        size: Most rows of a call, at least 1.
        rows: Tensors ``[b, T, ...]`` whose rows are split.
        shared: Tensors that every call reads whole.
        parameters: Leaves that the function reads and that learn.

    Returns:
        ``[b, T, ...]``.

    Example:
        >>> weight, x = torch.ones(3, requires_grad=True), torch.ones(1, 5, 3)
        >>> out = by_rows(lambda span, part: part * weight, 2, [x], [], [weight])
        >>> out.sum().backward()
        >>> out.shape, weight.grad
        (torch.Size([1, 5, 3]), tensor([5., 5., 5.]))
    """
    result: Tensor = _ByRows.apply(function, size, len(rows), len(shared), *rows, *shared, *parameters)
    return result


class _ByRows(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, function: Callable[..., Tensor], size: int, rows: int, shared: int, *tensors: Tensor
    ) -> Tensor:
        ctx.function, ctx.context, ctx.counts = function, copy_context(), (rows, shared)
        ctx.save_for_backward(*tensors)
        kind, count = tensors[0].device.type, tensors[0].shape[1]
        ctx.spans = [slice(start, min(start + size, count)) for start in range(0, count, size)]
        # Without a cache: weights that were cast where nothing has gradients must not be found where they have.
        ctx.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False)
        out = None
        with torch.autocast(*ctx.autocast):
            for span in ctx.spans:
                part = function(span, *(each[:, span] for each in tensors[:rows]), *tensors[rows : rows + shared])
                if out is None:
                    out = part.new_empty(len(part), count, *part.shape[2:])
                out[:, span] = part
        assert out is not None, "there are rows"
        return out

    @staticmethod
    @override
    @once_differentiable
    def backward(ctx: Any, *of_out: Tensor) -> Any:
        (grad,), (rows, shared) = of_out, ctx.counts
        tensors, learns = ctx.saved_tensors, ctx.needs_input_grad[4:]
        totals = [torch.zeros_like(each) if wanted else None for each, wanted in zip(tensors, learns, strict=True)]
        for span in ctx.spans:
            read = [each[:, span] for each in tensors[:rows]] + list(tensors[rows : rows + shared])
            read = [each.detach().requires_grad_(wanted) for each, wanted in zip(read, learns, strict=False)]
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                part = ctx.context.run(ctx.function, span, *read)
            places = [place for place, wanted in enumerate(learns) if wanted]
            inputs = [*read, *tensors[rows + shared :]]
            found = torch.autograd.grad(part, [inputs[p] for p in places], grad[:, span], allow_unused=True)
            for place, value in zip(places, found, strict=True):
                total = totals[place]
                if value is not None and total is not None:
                    (total[:, span] if place < rows else total).add_(value)
        return None, None, None, None, *totals

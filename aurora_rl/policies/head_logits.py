"""Logits of output heads that are matrices, multiplied out when something reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override


def multiply(states: Tensor, weights: Sequence[Tensor], head_of: Tensor | None) -> Tensor:
    """Multiply states with their heads, ``[..., Vd]``; arguments are the attributes of :class:`HeadLogits`."""
    if head_of is None:
        return F.linear(states, weights[0])
    rows = rows_by_head(head_of, len(weights))
    parts = [F.linear(states[here], weight) for here, weight in zip(rows, weights, strict=True)]
    return torch.cat(parts)[torch.cat(rows).argsort()]


def rows_by_head(head_of: Tensor, count: int) -> list[Tensor]:
    """Return the rows of each of ``count`` heads, given the head of each row, ``[X]`` int64.

    Raises:
        ValueError: There is no such head.

    Example:
        >>> rows_by_head(torch.tensor([1, 0, 1]), 2)
        [tensor([1]), tensor([0, 2])]
    """
    rows = [(head_of == head).nonzero()[:, 0] for head in range(count)]
    if sum(map(len, rows)) != len(head_of):
        raise ValueError(f"head_of must lie in 0 .. {count - 1}, got {head_of.unique().tolist()}")
    return rows


class HeadLogits(Tensor):
    """The tensor ``states @ weight.T``, computed by the first operation that reads more of it than its shape.

    ``Drafter.unroll`` returns its logits so. An objective that can go through the head in chunks of rows takes
    ``states`` and ``weights`` in their place; all others see a plain tensor.

    Attributes:
        states: Inputs of the heads, ``[..., H]``.
        weights: The heads, ``[Vd, H]`` each: one, or several where rows have heads of their own.
        head_of: Head of each row, ``[X]`` int64; None if there is one head.

    Example:
        >>> logits = HeadLogits(torch.ones(2, 3), torch.ones(4, 3))
        >>> logits.shape, type(logits + 1) is Tensor
        (torch.Size([2, 4]), True)
        >>> HeadLogits(torch.ones(2, 3), [torch.ones(4, 3), torch.zeros(4, 3)], torch.tensor([1, 0])) + 0
        tensor([[0., 0., 0., 0.],
                [3., 3., 3., 3.]])
    """

    states: Tensor
    weights: tuple[Tensor, ...]
    head_of: Tensor | None
    _learns: bool

    def __new__(cls, states: Tensor, weight: Tensor | Sequence[Tensor], head_of: Tensor | None = None) -> HeadLogits:
        """Make a tensor of the product's shape and without memory.

        ``weight`` is the head, or a sequence of heads; ``states`` are ``[X, H]`` where rows have heads of their own.
        """
        weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
        shape = (*states.shape[:-1], len(weights[0]))
        logits = Tensor._make_wrapper_subclass(cls, shape, dtype=weights[0].dtype, device=weights[0].device)
        logits.states, logits.weights, logits.head_of = states, weights, head_of
        logits._learns = torch.is_grad_enabled()
        return logits

    def some(self, rows: Tensor) -> HeadLogits:
        """Return the logits of some rows, ``[r]`` int64, which are not multiplied out either."""
        return HeadLogits(self.states[rows], self.weights, None if self.head_of is None else self.head_of[rows])

    @cached_property
    def product(self) -> Tensor:
        """The plain tensor."""
        with torch.set_grad_enabled(self._learns):  # as if it had been computed at once; metrics may read it first
            return multiply(self.states, self.weights, self.head_of)

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func == Tensor.shape.__get__:  # type: ignore[attr-defined]
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args)
        args, kwargs = tree_map_only(HeadLogits, lambda logits: logits.product, (tuple(args), dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    @override
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return NotImplemented  # only reached where __torch_function__ was switched off

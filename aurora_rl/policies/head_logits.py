"""Logits of an output head that is one matrix, multiplied out when something reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only
from typing_extensions import override


class HeadLogits(Tensor):
    """The tensor ``states @ weight.T``, computed by the first operation that reads more of it than its shape.

    ``Drafter.unroll`` returns its logits so. An objective that can go through the head in chunks of rows takes
    ``states`` and ``weight`` in their place; all others see a plain tensor.

    Example:
        >>> logits = HeadLogits(torch.ones(2, 3), torch.ones(4, 3))
        >>> logits.shape, type(logits + 1) is Tensor
        (torch.Size([2, 4]), True)
    """

    states: Tensor
    weight: Tensor
    _learns: bool

    def __new__(cls, states: Tensor, weight: Tensor) -> HeadLogits:
        """Make a tensor of the product's shape and without memory.

        Args:
            states: Inputs of the head, ``[..., H]``.
            weight: The head, ``[Vd, H]``.
        """
        logits = Tensor._make_wrapper_subclass(
            cls, (*states.shape[:-1], len(weight)), dtype=weight.dtype, device=weight.device
        )
        logits.states, logits.weight, logits._learns = states, weight, torch.is_grad_enabled()
        return logits

    @cached_property
    def product(self) -> Tensor:
        """The plain tensor."""
        with torch.set_grad_enabled(self._learns):  # as if it had been computed at once; metrics may read it first
            return F.linear(self.states, self.weight)

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

"""What the queries of a pass see: the text before a tree, and keys of the tree.

Legend: ``b`` slots, ``T`` queries of each, ``W`` keys of its tree, ``L`` columns of keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class TreeMask:
    """Keys that the queries of a pass see, without a tensor as long as the text.

    The keys of a slot lie in columns: its text in ``[0, prefix)`` and its tree in ``[prefix, prefix + W)``. Columns
    after the tree hold nothing.

    Attributes:
        prefix: Number of tokens of each slot's text, ``[b]`` int64.
        seen: Whether a query sees a key of its tree, ``[b, T, W]`` bool. None if the queries are the keys of the tree,
            and each sees those up to itself: a chain, or a chunk of a prompt. Queries that pad a chunk need no keys.
        first: First column of the text that a query sees, ``[b, T]`` int64, of attention with a window; None for the
            whole text. It bounds the text alone, ``seen`` the tree.

    Raises:
        ValueError: Shapes do not fit, or ``seen`` is not bool.

    Example:
        >>> mask = TreeMask(torch.tensor([1]), torch.tensor([[[True, False], [False, True]]]))
        >>> mask.dense(2, 4).int()
        tensor([[[1, 1, 0, 0],
                 [1, 0, 1, 0]]], dtype=torch.int32)
    """

    prefix: Tensor
    seen: Tensor | None = None
    first: Tensor | None = None
    _bias: dict[tuple[int, int, int, torch.dtype], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check shapes and dtypes."""
        slots, seen, first = len(self.prefix), self.seen, self.first
        if self.prefix.ndim != 1:
            raise ValueError(f"prefix must be [b], got {list(self.prefix.shape)}")
        if seen is not None and (seen.ndim != 3 or len(seen) != slots or seen.dtype != torch.bool):
            raise ValueError(f"seen must be [b, T, W] bool with b = {slots}, got {list(seen.shape)} {seen.dtype}")
        if first is not None and (first.ndim != 2 or len(first) != slots):
            raise ValueError(f"first must be [b, T] with b = {slots}, got {list(first.shape)}")

    def dense(self, length: int, columns: int) -> Tensor:
        """Return whether each of ``length`` queries sees each of ``columns`` columns, ``[b, T, L]`` bool."""
        device = self.prefix.device
        column = torch.arange(columns, device=device)
        own = column - self.prefix[:, None]
        text = (own < 0)[:, None]
        if self.first is not None:
            text = text & (column >= self.first[:, :, None])
        width = length if self.seen is None else self.seen.shape[2]
        if self.seen is None:
            tree = own[:, None] <= torch.arange(length, device=device)[:, None]
        elif width:
            tree = self.seen.gather(2, own.clamp(0, width - 1)[:, None].expand(-1, length, -1))
        else:
            tree = text
        return torch.where(((own >= 0) & (own < width))[:, None], tree, text).expand(-1, length, -1)

    def bias(self, group: int, length: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores, 0 or −inf, with the rows of each head of a group: ``[b, 1, group * T, L]``.

        It is kept, since all layers of a pass that see the same add the same.
        """
        key = group, length, columns, dtype
        if key not in self._bias:
            dense = self.dense(length, columns)
            bias = torch.zeros_like(dense, dtype=dtype).masked_fill_(~dense, -torch.inf)
            self._bias[key] = bias.repeat(1, group, 1)[:, None]
        return self._bias[key]

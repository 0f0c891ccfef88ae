"""The keys that the queries of a pass see: the text before a tree, and keys of the tree.

Legend: ``b`` slots, ``T`` queries of each, ``W`` keys of its tree, ``L`` columns of keys. In :class:`MaskParts`, ``X``
and ``Y`` columns of the first and of the second part, ``group`` heads that share a key head.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskParts(NamedTuple):
    """A mask in two parts: columns of the text that all queries of a slot see, and those that only some see.

    Attributes:
        text: Columns of the first part, of all slots.
        text_bias: What is added to their scores, 0 or −inf, ``[b, 1, 1, X]``; None if every slot sees them all.
        own: Columns of the second part, ``[b, Y]`` int64: the edge of a window, and the tree.
        own_bias: What is added to their scores, with the rows of each head of a group, ``[b, 1, group * T, Y]``.
    """

    text: slice
    text_bias: Tensor | None
    own: Tensor
    own_bias: Tensor


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
    _kept: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

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
        if key not in self._kept:
            self._kept[key] = _bias(self.dense(length, columns), dtype).repeat(1, group, 1)[:, None]
        kept: Tensor = self._kept[key]
        return kept

    def parts(self, group: int, length: int, columns: int, dtype: torch.dtype) -> MaskParts:
        """Return the mask of :meth:`bias` without rows for the text, which all queries see alike up to a window's edge.

        It is kept as :meth:`bias` is.
        """
        key = "parts", group, length, columns, dtype
        if key not in self._kept:
            self._kept[key] = self._parts(group, length, columns, dtype)
        kept: MaskParts = self._kept[key]
        return kept

    def _parts(self, group: int, length: int, columns: int, dtype: torch.dtype) -> MaskParts:
        device, prefix = self.prefix.device, self.prefix
        first = torch.zeros_like(prefix)[:, None] if self.first is None else self.first.clamp(min=0)
        start = first.amax(1).minimum(prefix)  # from here on every query of the slot sees the text
        edge = int((start - first.amin(1).minimum(start)).max())
        text = slice(int(start.min()), int(prefix.max()))
        column = torch.arange(text.start, text.stop, device=device)
        whole = (column >= start[:, None]) & (column < prefix[:, None])
        text_bias = None if bool(whole.all()) else _bias(whole, dtype)[:, None, None]
        before = start[:, None] - edge + torch.arange(edge, device=device)
        seen_before = (before[:, None] >= first[:, :, None]).expand(-1, length, -1)
        width = length if self.seen is None else self.seen.shape[2]
        node = torch.arange(width, device=device)
        of_tree = prefix[:, None] + node
        if self.seen is None:
            seen = (node <= torch.arange(length, device=device)[:, None]).expand(len(prefix), -1, -1)
        else:
            seen = self.seen
        own, visible = torch.cat([before, of_tree], 1), torch.cat([seen_before, seen], 2)
        visible = visible & ((own >= 0) & (own < columns))[:, None]
        if not own.shape[1]:  # PyTorch's attention on a CPU crashes without keys: one that nothing sees
            own, visible = F.pad(own, (0, 1)), F.pad(visible, (0, 1))
        own_bias = _bias(visible, dtype).repeat(1, group, 1)[:, None]
        return MaskParts(text, text_bias, own.clamp(0, columns - 1), own_bias)

    @property
    def words(self) -> Tensor:
        """The nodes of its tree that each query sees, as bits, ``[b, T, ⌈W / 64⌉]`` int64.

        Key ``j`` is bit ``j % 64`` of word ``j // 64``. The words are kept, so that all layers of a pass share them.

        Raises:
            ValueError: ``seen`` is None: a chain needs no bits.

        Example:
            >>> TreeMask(torch.tensor([5]), torch.tensor([[[True, False, True]]])).words
            tensor([[[5]]])
        """
        if self.seen is None:
            raise ValueError("a mask without seen is causal and has no bits; give seen")
        if "words" not in self._kept:
            words = F.pad(self.seen, (0, -self.seen.shape[2] % 64)).unflatten(2, (-1, 64))
            self._kept["words"] = (words.long() << torch.arange(64, device=words.device)).sum(-1)
        kept: Tensor = self._kept["words"]
        return kept


def _bias(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, -torch.inf)

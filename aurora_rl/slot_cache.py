"""A static KV cache for requests of unequal length, and the masks by which text and draft trees are read from it.

Legend: ``B`` slots, ``b`` of them in a pass, ``T`` tokens of a slot in a pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache


class SlotCache(Cache):
    """Keys and values of every slot in one block, written at a place of our choosing.

    Args:
        config: the model's (text) configuration.
        num_slots: ``B``.
        max_length: columns of a slot.
        dtype: of keys and values.
        device: where they live.
    """

    def __init__(
        self, config: PretrainedConfig, num_slots: int, max_length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__(layers=[])
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (2, config.num_hidden_layers, num_slots, max_length, config.num_key_value_heads, head_dim)
        self.block = torch.zeros(shape, dtype=dtype, device=device)

    def widen(self, columns: int) -> None:
        """Give every slot at least so many columns; what is held stays."""
        if (more := columns - self.block.shape[3]) > 0:
            self.block = F.pad(self.block, (0, 0, 0, 0, 0, more))

    def aim(self, slots: Tensor, columns: Tensor, end: int) -> None:
        """Say where the next pass writes (``columns`` ``[b, T]`` of ``slots`` ``[b]``) and reads (``[0, end)``)."""
        num_slots, max_length = self.block.shape[2:4]
        self._flat = (slots[:, None].to(columns.device) * max_length + columns).flatten()
        first, last = int(slots[0]), int(slots[-1])
        # A run of neighbouring slots is read through a view; any other choice has to be gathered, layer by layer.
        run = slots.tolist() == list(range(first, last + 1))
        self._rows = slice(first, last + 1) if run else slots.to(columns.device)
        self._end = end

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write keys and values, ``[b, heads, T, d]``, and return what the pass may read, ``[b, heads, end, d]``."""
        read = []
        for part, states in enumerate((key_states, value_states)):
            layer = self.block[part, layer_idx]
            layer.view(-1, *layer.shape[2:]).index_copy_(0, self._flat, states.transpose(1, 2).flatten(0, 1))
            read.append(layer[self._rows, : self._end].transpose(1, 2))
        return read[0], read[1]

    def move(self, slots: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy columns ``source`` to ``target`` (each ``[m]``) of ``slots`` (``[m]``) in all layers at once."""
        self.block[:, :, slots, target] = self.block[:, :, slots, source]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns that the pass reads; transformers asks only where it was given no positions."""
        return self._end

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Key length and offset of the mask, of which transformers is given a finished one."""
        return self._end, 0


def cache_mask(seen: Tensor, past: Tensor, end: int) -> Tensor:
    """What the tokens of a pass may read of their slots' columns: all before ``past``, and some of those behind.

    Args:
        seen: ``[b, T, W]`` bool, whether a token sees each of the ``W`` columns from ``past`` on.
        past: ``[b, 1]`` int64.
        end: columns that the pass reads.

    Returns:
        ``[b, T, end]`` bool.

    Example:
        >>> cache_mask(torch.tensor([[[True, False], [False, True]]]), torch.tensor([[1]]), 4).int()
        tensor([[[1, 1, 0, 0],
                 [1, 0, 1, 0]]], dtype=torch.int32)
    """
    width = seen.shape[2]
    column = torch.arange(end, device=past.device) - past
    inside = (column >= 0) & (column < width)
    index = column.clamp(0, width - 1)[:, None, :].expand(-1, seen.shape[1], -1)
    return torch.where(inside[:, None, :], seen.gather(2, index), (column < 0)[:, None, :])


def sliding_window(config: PretrainedConfig) -> int | None:
    """Tokens that a layer of a model looks back at most, where some layer does not see the whole text."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)  # none are given where all layers are of one kind, as Mistral's
    return window if window and (types is None or "sliding_attention" in types) else None

"""A static KV cache for requests of unequal length.

Legend: ``B`` slots, ``b`` of them in a part of a pass, ``T`` tokens of each, ``L`` columns that the part reads. Of a
part, ``depth`` ``[b, T]`` int64 are the depths of its tokens, ``past`` ``[b, 1]`` int64 is the first column that it
writes, and ``end`` is ``L``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from typing_extensions import override


class KVShape(NamedTuple):
    """Heads and head size of the keys, or of the values, of one layer."""

    heads: int
    head_dim: int


class RecurrentStateError(ValueError):
    """A model keeps a state that later tokens overwrite, so that it cannot be rolled back to the accepted node."""


class _KeysAndValuesOnly(Cache):
    """A cache that refuses what cannot be rolled back to an accepted node: convolution and recurrent states."""

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RecurrentStateError("it keeps a recurrent state, which cannot be rolled back to the accepted node")

    update_conv_state = update_recurrent_state = has_previous_state = _refuse


class ShapeRecorder(_KeysAndValuesOnly, DynamicCache):
    """A growing cache that notes in ``shapes`` the shapes of the keys and values that each layer writes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[int, tuple[KVShape, KVShape]] = {}

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.shapes[layer_idx] = KVShape(*key_states.shape[1::2]), KVShape(*value_states.shape[1::2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def uniform_shapes(config: PretrainedConfig) -> dict[int, tuple[KVShape, KVShape]]:
    """Return the shapes of a model whose layers are alike, by its configuration."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = KVShape(config.num_key_value_heads, head_dim)
    return {layer: (shape, shape) for layer in range(config.num_hidden_layers)}


class Packing:
    """Takes the padding out of the rows of a pass, and puts it back.

    Args:
        present: Tokens that are no padding, ``[b, T]`` bool.

    Example:
        >>> packing = Packing(torch.tensor([[True, False], [True, True]]))
        >>> packing.pack(torch.tensor([[1, 2], [3, 4]])), packing.unpack(torch.tensor([[1, 3, 4]]))
        (tensor([[1, 3, 4]]), tensor([[1, 0],
                [3, 4]]))
    """

    def __init__(self, present: Tensor) -> None:
        self._shape, self._index = present.shape, present.flatten().nonzero().flatten()

    def pack(self, x: Tensor) -> Tensor:
        """Return states ``[b, T, ...]`` as ``[1, R, ...]``."""
        return x.flatten(0, 1)[self._index][None]

    def __len__(self) -> int:
        return len(self._index)

    def unpack(self, x: Tensor) -> Tensor:
        """Return states ``[1, R, ...]`` as ``[b, T, ...]``, with zeros for padding."""
        rows = x.new_zeros(self._shape.numel(), *x.shape[2:])
        return rows.index_copy_(0, self._index, x[0]).unflatten(0, self._shape)


class PassPart(NamedTuple):
    """Slots whose tokens attend together in a pass: where they are written, and what they read.

    Attributes:
        slots: The slots, ``[b]`` int64.
        columns: Column that each token is written to, ``[b, T]`` int64.
        end: Columns that are read, ``[0, end)``.
        present: Tokens that are no padding, ``[b, T]`` bool; None if all are tokens.
        order: Result of :func:`path_order`, by which each token reads a copy of its columns; None reads a view that all
            tokens share.
    """

    slots: Tensor
    columns: Tensor
    end: int
    present: Tensor | None = None
    order: Tensor | None = None


def rows_of(slots: Tensor, device: torch.device) -> slice | Tensor:
    """Return the index of some slots' rows, ``[b]`` int64: a slice, hence of a view, if they follow each other.

    Example:
        >>> rows_of(torch.tensor([1, 2]), torch.device("cpu")), rows_of(torch.tensor([0, 2]), torch.device("cpu"))
        (slice(1, 3, None), tensor([0, 2]))
    """
    first, last = int(slots[0]), int(slots[-1])
    return slice(first, last + 1) if slots.tolist() == list(range(first, last + 1)) else slots.to(device)


class SlotCache(_KeysAndValuesOnly):
    """Keys and values of every slot in one block for each of the layers' shapes, written at a place of our choosing."""

    def __init__(
        self,
        shapes: Mapping[int, tuple[KVShape, KVShape]],
        num_slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        self._places: dict[int, list[tuple[KVShape, int]]] = {}
        counts: dict[KVShape, int] = {}
        for layer, pair in shapes.items():
            self._places[layer] = []
            for shape in pair:
                self._places[layer].append((shape, counts.setdefault(shape, 0)))
                counts[shape] += 1
        self.blocks = {
            shape: torch.zeros(count, num_slots, max_length, *shape, dtype=dtype, device=device)
            for shape, count in counts.items()
        }

    @property
    def columns(self) -> int:
        """Columns of a slot."""
        return next(iter(self.blocks.values())).shape[2]

    @property
    def nbytes(self) -> int:
        """Memory of keys and values, in bytes."""
        return sum(block.nbytes for block in self.blocks.values())

    def widen(self, columns: int) -> None:
        """Give every slot at least so many columns; what is held stays."""
        if (more := columns - self.columns) > 0:
            self.blocks = {shape: F.pad(block, (0, 0, 0, 0, 0, more)) for shape, block in self.blocks.items()}

    def aim(self, *parts: PassPart, packed: bool = False) -> None:
        """Set where the next pass writes and what it reads.

        Args:
            *parts: What attends apart in the pass; one part unless it is packed.
            packed: Whether the pass is over the ``R`` tokens of all parts that are no padding, in one row ``[1, R]``.
                Otherwise it is over all of the part's tokens, ``[b, T]``.
        """
        self._packings = None
        if packed:
            self._packings = [
                Packing(torch.ones_like(part.columns, dtype=torch.bool) if part.present is None else part.present)
                for part in parts
            ]
        firsts = [part.slots[:, None].to(part.columns.device) * self.columns for part in parts]
        self._flat = self.pack(*(first + part.columns for first, part in zip(firsts, parts, strict=True))).flatten()
        self._views = []
        for first, part in zip(firsts, parts, strict=True):
            order = None if part.order is None else part.order + first[:, None]
            self._views.append((rows_of(part.slots, part.columns.device), part.end, order))

    @override
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        # Of a pass of one part.
        self.write(layer_idx, key_states, value_states)
        return self.read(layer_idx, 0)

    def write(self, layer_idx: int, key: Tensor, value: Tensor) -> None:
        """Write a layer's keys and values of the pass, ``[b, heads, T, d]``."""
        for (shape, index), states in zip(self._places[layer_idx], (key, value), strict=True):
            held = self.blocks[shape][index]
            held.view(-1, *shape).index_copy_(0, self._flat, states.transpose(1, 2).flatten(0, 1))

    def read(self, layer_idx: int, part: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values that a part may read, ``[b, heads, L, d]``, or a copy for each token by an order.

        Args:
            layer_idx: The layer, which has written those of the pass.
            part: Number of the part, of those that :meth:`aim` was given.
        """
        read, (rows, end, order) = [], self._views[part]
        for shape, index in self._places[layer_idx]:
            held = self.blocks[shape][index]
            if order is None:
                read.append(held[rows, :end].transpose(1, 2))
            else:
                own = held.view(-1, shape.heads * shape.head_dim).index_select(0, order.flatten())
                read.append(own.view(-1, end, *shape).transpose(1, 2))
        return read[0], read[1]

    def unpack(self, x: Tensor) -> list[Tensor]:
        """Return the states ``[1, R, ...]`` of a pass by parts, each ``[b, T, ...]`` with zeros for padding."""
        if self._packings is None:
            return [x]
        rows = x.split([len(packing) for packing in self._packings], dim=1)
        return [packing.unpack(part) for packing, part in zip(self._packings, rows, strict=True)]

    def pack(self, *parts: Tensor) -> Tensor:
        """Return the states of each part, ``[b, T, ...]``, as the pass has them, without padding ``[1, R, ...]``."""
        if self._packings is None:
            return parts[0]
        return torch.cat([packing.pack(x) for packing, x in zip(self._packings, parts, strict=True)], dim=1)

    def rows(self, slot: int) -> list[Tensor]:
        """Return views of what a slot holds, a row for each column: ``[columns, n, heads, d]`` for each shape.

        ``n`` counts the key and value tensors of all layers that have the shape.
        """
        return [block[:, slot].transpose(0, 1) for block in self.blocks.values()]

    def move(self, slots: Tensor, source: Tensor, target: Tensor) -> None:
        """Copy columns ``source`` to ``target`` (each ``[m]``) of ``slots`` (``[m]``) in all layers at once."""
        for block in self.blocks.values():
            block[:, slots, target] = block[:, slots, source]

    @override
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._views[0][1]  # transformers asks only if it gets no positions

    @override
    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self._views[0][1], 0  # key length and offset


def column_positions(depth: Tensor, past: Tensor, end: int) -> Tensor:
    """Return the position of the token in each column, ``[b, L]`` int64: a text lies in order, a tree by its depths.

    Example:
        >>> column_positions(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[2]]), 6)
        tensor([[0, 1, 2, 3, 3, 4]])
    """
    column = torch.arange(end, device=past.device) - past
    return past + torch.where(column < 0, column, depth.gather(1, column.clamp(0, depth.shape[1] - 1)))


def path_order(seen: Tensor | None, depth: Tensor, past: Tensor, end: int) -> Tensor | None:
    """Return the column of each position on a token's path, ``[b, T, L]`` int64; None if every column is its position.

    Later positions have some column. ``seen`` ``[b, T, T]`` bool are a token's ancestors and itself; None is a text.

    Example:
        >>> seen = torch.tensor([[[True, False, False], [True, True, False], [True, False, True]]])
        >>> path_order(seen, torch.tensor([[0, 1, 1]]), torch.tensor([[2]]), 5)
        tensor([[[0, 1, 2, 2, 2],
                 [0, 1, 2, 3, 2],
                 [0, 1, 2, 4, 2]]])
    """
    if seen is None:
        return None
    b, length, _ = seen.shape
    token = torch.arange(length, device=seen.device)
    at = depth[:, None].expand(b, length, length)
    path = torch.zeros_like(at).scatter_reduce_(2, at, torch.where(seen, token, 0), "amax")
    if bool(((path == token) | (token > depth[:, :, None])).all()):
        return None
    position = torch.arange(end, device=seen.device)
    after = (position - past)[:, None].expand(b, length, end)
    return torch.where(after < 0, position, past[:, None] + path.gather(2, after.clamp(0, length - 1)))


def sliding_window(config: PretrainedConfig) -> int | None:
    """Return how many tokens a layer looks back at most; None if every layer sees the whole text."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)  # none are given where all layers are of one kind, as Mistral's
    return window if window and (types is None or "sliding_attention" in types) else None

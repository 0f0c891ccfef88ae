"""Attention of a text and of draft trees that leave it, in one pass and with gradients: what a drafter trains by.

Legend: ``b`` texts, ``S`` tokens of each, ``N`` nodes of its trees, ``h`` heads, ``g`` key heads, ``d`` head size.

Keys and queries are the text and then its nodes, each tree depth-first. Two numbers per node define the mask: how much
of the text it sees, and where its subtree ends. Node ``j`` is node ``i`` or an ancestor of it if
``j <= i < ends[j]``. So no row needs columns outside of its tree and of the text before it. Where trees lie by their
anchors, most columns are skipped.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128  # rows and columns of FlexAttention's blocks, and its smallest head
_SMALLEST_HEAD = 16
_ROWS = 128  # nodes whose columns are read together elsewhere


def tree_training_attention(
    query: Tensor, key: Tensor, value: Tensor, text_seen: Tensor, ends: Tensor, *, scale: float | None = None
) -> Tensor:
    """Attend from a text, causally, and from nodes of trees to the text up to where they leave it and to their paths.

    Args:
        query: Queries of the text and then of the nodes, ``[b, h, S + N, d]``.
        key: Keys, ``[b, g, S + N, d]``.
        value: Values, ``[b, g, S + N, d]``.
        text_seen: Tokens of the text that a node sees, ``[b, N]`` int64.
        ends: One past the last node of the subtree of each node, ``[b, N]`` int64; ``j + 1`` of padding.
        scale: Factor on the scores; None is ``d ** -0.5``.

    Returns:
        ``[b, h, S + N, d]``.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> from aurora_kernels import tree_training_attention
        >>> query, key = torch.randn(1, 4, 5 + 3, 16, requires_grad=True), torch.randn(1, 2, 5 + 3, 16)
        >>> text_seen, ends = torch.tensor([[2, 2, 5]]), torch.tensor([[2, 2, 3]])  # node 1 is below node 0
        >>> out = tree_training_attention(query, key, key, text_seen, ends)
        >>> out.sum().backward()
        >>> out.shape
        torch.Size([1, 4, 8, 16])
    """
    (_, heads, length, d), groups, nodes = query.shape, key.shape[1], text_seen.shape[1]
    if heads % groups or key.shape != value.shape or key.shape[2:] != (length, d) or ends.shape != text_seen.shape:
        raise ValueError(
            f"query must be [b, h, S + N, d], key and value [b, g, S + N, d] and text_seen and ends [b, N], got "
            f"{[list(part.shape) for part in (query, key, value, text_seen, ends)]}"
        )
    size = length - nodes
    if query.is_cuda and d >= _SMALLEST_HEAD and importlib.util.find_spec("triton"):
        blocks = training_block_mask(size, text_seen, ends)
        return compiled_attention()(query, key, value, block_mask=blocks, scale=scale, enable_gqa=heads > groups)
    text = F.scaled_dot_product_attention(
        query[:, :, :size], key[:, :, :size], value[:, :, :size], is_causal=True, scale=scale, enable_gqa=heads > groups
    )
    return torch.cat([text, *_by_rows(query, key, value, text_seen, ends, scale)], dim=2)


def _by_rows(
    query: Tensor, key: Tensor, value: Tensor, text_seen: Tensor, ends: Tensor, scale: float | None
) -> Iterator[Tensor]:
    """Yield the attention of a few nodes at a time, to the columns that any of them sees."""
    (b, heads, length, d), groups, nodes = query.shape, key.shape[1], text_seen.shape[1]
    size = length - nodes
    for start in range(0, nodes, _ROWS):
        stop = min(start + _ROWS, nodes)
        text = int(text_seen[:, start:stop].max())
        first = int((ends[:, : start + 1] > start).int().argmax(1).min())
        row, node = (torch.arange(*span, device=key.device) for span in ((start, stop), (first, stop)))
        path = (node <= row[:, None]) & (row[:, None] < ends[:, None, first:stop])
        seen = torch.cat([torch.arange(text, device=key.device) < text_seen[:, start:stop, None], path], dim=2)
        keys, values = (
            torch.cat([part[:, :, :text], part[:, :, size + first : size + stop]], dim=2) for part in (key, value)
        )
        # The queries of a group become rows of one key head, so that keys are not repeated.
        rows = query[:, :, size + start : size + stop].reshape(b, groups, -1, d)
        mask = seen.repeat(1, heads // groups, 1)[:, None]
        out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=scale)
        yield out.reshape(b, heads, stop - start, d)


@functools.cache
def compiled_attention(backend: str | Callable[..., Any] = "inductor") -> Any:
    """Return FlexAttention compiled for texts and trees of all sizes, by a backend of ``torch.compile``."""
    return torch.compile(flex_attention, dynamic=True, backend=backend)


def training_block_mask(size: int, text_seen: Tensor, ends: Tensor) -> BlockMask:
    """Return the mask of a text of ``size`` tokens and its trees for FlexAttention, without a tensor of all pairs.

    It is the one that ``create_block_mask`` finds by asking for every pair.

    Args:
        size: Tokens of the text, ``S``.
        text_seen: Tokens of the text that a node sees, ``[b, N]`` int64.
        ends: One past the last node of the subtree of each node, ``[b, N]`` int64; ``j + 1`` of padding.

    Example:
        >>> mask = training_block_mask(5, torch.tensor([[2, 2, 5]]), torch.tensor([[2, 2, 3]]))
        >>> row, key = torch.tensor(6), torch.tensor([1, 2, 5, 6, 7])  # node 1 sees two tokens, node 0 and itself
        >>> mask.mask_mod(torch.tensor(0), torch.tensor(0), row, key)
        tensor([ True, False,  True,  True, False])
    """
    device, (b, nodes) = ends.device, ends.shape
    length = size + nodes
    count = -(-length // _BLOCK)
    # Of every row: one past the last token of the text that it sees. Of every node's key: one past its last row.
    limit = torch.cat([torch.arange(1, size + 1, device=device).expand(b, -1), text_seen], dim=1)
    end = F.pad(ends + size, (size, 0))

    def by_block(values: Tensor, fill: int) -> Tensor:
        return F.pad(values, (0, count * _BLOCK - length), value=fill).unflatten(1, (count, _BLOCK))

    is_node = by_block((torch.arange(length, device=device) >= size).expand(b, -1).int(), 0).bool()
    most, least = by_block(limit, -1).amax(2)[:, :, None], by_block(limit, length).amin(2)[:, :, None]
    tall = by_block(end, -1).masked_fill(~is_node, -1).amax(2)[:, None]
    short = by_block(end, length).masked_fill(~is_node, count * _BLOCK + 1).amin(2)[:, None]
    block = torch.arange(count, device=device)
    row, column = block[:, None] * _BLOCK, block * _BLOCK
    below = block[:, None] >= block
    some = ((column < size) & (most > column)) | ((column + _BLOCK > size) & below & (tall > row))
    text = (column >= size) | (least >= (column + _BLOCK).clamp(max=size))
    trees = (column + _BLOCK <= size) | (below & (block[:, None] != block) & (short >= row + _BLOCK))
    whole = text & trees & (row + _BLOCK <= length) & (column + _BLOCK <= length)
    text_size = torch.tensor(size, device=device)

    def visible(index: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        on_path = (key <= query) & (query < end[index, key])
        return torch.where(key < text_size, key < limit[index, query], on_path)

    def ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
        dense = dense[:, None].int()
        return dense.sum(-1).int(), dense.argsort(dim=-1, descending=True, stable=True).int()

    return BlockMask.from_kv_blocks(
        *ordered(some & ~whole), *ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )

"""Attention of draft trees to a cached text and to themselves, for verification and for prompts.

Legend: ``b`` slots, ``h`` heads, ``g`` key heads, ``G = h / g`` heads of a group, ``T`` queries, ``W`` keys of a tree,
``L`` columns of keys, ``d`` head size, ``dv`` head size of values.

The queries of a group become rows of one key head, so that no key is repeated. On CUDA a Triton kernel splits the keys
over programs; a text needs no mask there. Elsewhere PyTorch's fused attention computes the same.
"""

from __future__ import annotations

import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from aurora_kernels.tree_mask import TreeMask

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Entries of the largest mask of the text that a CPU makes: up to there one call under it is faster than two without.
_BIAS = 2**18
# Scores that the form with a cap or with sinks has at a time.
_SCORES = 2**24


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attend from the nodes of trees, or from a chunk of a prompt, to each slot's text and tree.

    Queries, keys, values and sinks have gradients, with ``softcap`` and ``block_table`` too. They are finite where keys
    or values that are not finite have no part in a row, by the mask or by a score of −inf. A row that such keys or
    values make not finite is a constant. The kernel has no gradients: where one of these tensors requires a gradient,
    PyTorch attends, on a GPU too.

    Args:
        query: Queries, ``[b, h, T, d]``.
        key: Keys, ``[b, g, L, d]``, in columns as :class:`TreeMask` says; with a ``block_table`` the keys of pages,
            ``[pages, g, page, d]``.
        value: Values, ``[b, g, L, dv]``, or of pages, ``[pages, g, page, dv]``.
        mask: Keys that each query sees.
        scale: Factor on the scores; None is ``d ** -0.5``.
        softcap: Bound on the absolute value of a score, ``softcap * tanh(score / softcap)``; None for no bound.
        sinks: Score of nothing for each head, ``[h]``, that the softmax counts too; None for no such score.
        block_table: Page that holds each ``page`` columns of a slot, ``[b, blocks]`` int64; None if keys are
            contiguous.

    Returns:
        ``[b, h, T, dv]``; 0 for a query that sees nothing.

    Raises:
        ValueError: Shapes do not fit.

    Example:
        >>> from aurora_kernels import TreeMask, tree_attention
        >>> query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
        >>> root_and_two_children = torch.tensor([[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]).bool()
        >>> tree_attention(query, key, value, TreeMask(torch.tensor([7]), root_and_two_children)).shape
        torch.Size([1, 4, 3, 8])
    """
    _check(query, key, value, mask, sinks, block_table)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    learns = _learns(query, key, value, sinks)
    if _by_kernel(query, learns=learns):
        from aurora_kernels.tree_attention_triton import attend

        return attend(query, key, value, mask, scale, softcap, sinks, block_table)
    if block_table is not None:
        key, value = (part[block_table].transpose(1, 2).flatten(2, 3) for part in (key, value))
    out = _attend(query, key, value, mask, scale, softcap, sinks)
    # A score of −inf leaves no trace in ``out``, but in gradients.
    if all(_is_finite(each) for each in ((out, key) if learns else (out,))):
        return out
    return _isolated(out, query, key, value, mask, scale, softcap, sinks)


def _by_kernel(query: Tensor, *, learns: bool) -> bool:
    """Return whether the Triton kernel attends, which has no gradients: it does on CUDA where triton is installed."""
    return (
        query.is_cuda
        and query.dtype in _KERNEL_DTYPES
        and not learns
        and importlib.util.find_spec("triton") is not None
    )


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend by the form that is fastest for the problem."""
    if softcap is not None or sinks is not None:
        return _by_scores(query, key, value, mask, scale, softcap, sinks)
    learns = _learns(query, key, value, sinks)
    on_cpu = query.device.type == "cpu" and not learns and query.shape[-1] == value.shape[-1]
    if on_cpu and len(query) == 1 and mask.seen is None and mask.first is None:
        return _chunk(query, key, value, int(mask.prefix), scale)
    entries = len(query) * query.shape[1] // key.shape[1] * query.shape[2] * key.shape[2]
    if on_cpu and entries > _BIAS:
        return _in_parts(query, key, value, mask, scale)
    bias = mask.bias(query.shape[1] // key.shape[1], query.shape[2], key.shape[2], query.dtype)
    out = F.scaled_dot_product_attention(_packed(query, key), key, value, attn_mask=bias, scale=scale)
    return out.reshape(*query.shape[:3], -1)


def _isolated(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return ``out`` without what keys and values that are not finite did to queries that do not count them.

    To these they are 0 times what is not finite, which is not 0.
    """
    fit_key, fit_value = key.isfinite().all(-1), value.isfinite().all(-1)
    wrong = ~(fit_key & fit_value)
    columns = wrong.any(0).any(0).nonzero()[:, 0]
    if not len(columns):
        return out
    group = query.shape[1] // key.shape[1]
    dense = mask.dense(query.shape[2], key.shape[2])
    sees = (dense[:, None, :, columns] & wrong[:, :, None, columns]).any(-1).repeat_interleave(group, dim=1)
    clean_key, clean_value = key.masked_fill(~fit_key[..., None], 0.0), value.masked_fill(~fit_value[..., None], 0.0)
    clean = _attend(query, clean_key, clean_value, mask, scale, softcap, sinks)
    # The gradient of ``out`` is not finite even where nothing asks for it.
    found = torch.where(sees[..., None], out.detach(), clean)
    again = sees if clean.requires_grad else sees & ~out.isfinite().all(-1)
    for slot, head in again.any(-1).nonzero().tolist():
        at, rows = (slot, head // group), again[slot, head].nonzero()[:, 0]
        for part in rows.split(max(_SCORES // key.shape[2], 1)):
            queries = query[slot, head, part]
            with torch.no_grad():
                scores = _scores(queries, key[at], scale, softcap)
                counts = dense[slot, part] & (scores != -torch.inf)
                spoiled = (counts & ~(scores.isfinite() & fit_value[at])).any(-1)
            part, queries, counts, scores = part[~spoiled], queries[~spoiled], counts[~spoiled], scores[~spoiled]
            scores = torch.where(fit_key[at], _scores(queries, clean_key[at], scale, softcap), scores)
            scores = scores.masked_fill(~counts, -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].to(scores.dtype).expand(len(part), 1)], -1)
            nothing = (scores == -torch.inf).all(-1, keepdim=True)
            weights = scores.masked_fill(nothing, 0.0).softmax(-1).masked_fill(nothing, 0.0)[:, : key.shape[2]]
            found[slot, head, part] = (weights @ clean_value[at].to(weights.dtype)).to(found.dtype)
    return found


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return the scores ``[R, L]`` of queries ``[R, d]`` of a head, without a mask."""
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(precise) @ key.mT.to(precise) * scale
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _learns(*terms: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(term is not None and term.requires_grad for term in terms)


def _is_finite(x: Tensor) -> bool:
    """Return whether all numbers are finite; false, too, if they are so large that their sum is not."""
    return bool(x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)).isfinite())


def _packed(query: Tensor, key: Tensor) -> Tensor:
    """Return queries as rows of their key heads, ``[b, g, G * T, d]``."""
    return query.reshape(len(query), key.shape[1], -1, query.shape[-1])


def _by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with a cap or with sinks, which no fused attention of PyTorch knows."""
    b, heads, length, _ = query.shape
    group = heads // key.shape[1]
    precise = torch.promote_types(query.dtype, torch.float32)
    parts = mask.parts(group, length, key.shape[2], query.dtype)
    key, value = (torch.cat([each[:, :, parts.text], _columns(each, parts.own)], 2) for each in (key, value))
    rows, texts, columns = _packed(query, key), parts.text.stop - parts.text.start, key.shape[2]
    of_nothing = rows.new_full((heads,), -torch.inf, dtype=precise) if sinks is None else sinks.to(precise)
    of_nothing = of_nothing.view(-1, group, 1).expand(-1, -1, length).reshape(1, -1, group * length, 1)
    size, out = max(_SCORES // (b * key.shape[1] * columns), 1), []
    for part in range(0, group * length, size):
        few = slice(part, part + size)
        scores = rows[:, :, few] @ key.mT * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if parts.text_bias is not None:
            scores[..., :texts] += parts.text_bias
        scores[..., texts:] += parts.own_bias[:, :, few]
        scores = torch.cat([scores.to(precise), of_nothing[:, :, few].expand(b, -1, -1, -1)], -1)
        nothing = scores.amax(-1, keepdim=True) == -torch.inf
        # Not a number in a softmax would be one in its gradient, even where the weights are 0 afterwards.
        weights = scores.masked_fill_(nothing, 0.0).softmax(-1)[..., :columns].masked_fill(nothing, 0.0)
        out.append(weights.to(value.dtype) @ value)
    return torch.cat(out, dim=2).reshape(b, heads, length, -1)


def _chunk(query: Tensor, key: Tensor, value: Tensor, prefix: int, scale: float) -> Tensor:
    """Attend from a chunk of one slot's prompt: to the text before it without a mask, and causally to itself."""
    length, group = query.shape[2], query.shape[1] // key.shape[1]
    rows = query[0].unflatten(0, (-1, group))
    # A key head serves its group through a stride of 0.
    key, value = (part[0, :, None].expand(-1, group, -1, -1) for part in (key, value))
    chunk = slice(prefix, prefix + length)
    own, own_weight = _fused(rows, key[:, :, chunk], value[:, :, chunk], scale, causal=True)
    if prefix:
        text, text_weight = _fused(rows, key[:, :, :prefix], value[:, :, :prefix], scale)
        share = (text_weight - own_weight).sigmoid().nan_to_num_(0.0)[..., None]  # not a number where both are −inf
        own = own.lerp(text, share.to(own.dtype))
    return own.flatten(0, 1)[None]


def _in_parts(query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, scale: float) -> Tensor:
    """Attend to the text without a mask of rows, and to the tree and the edge of a window with a small one."""
    parts = mask.parts(query.shape[1] // key.shape[1], query.shape[2], key.shape[2], query.dtype)
    rows = _packed(query, key)
    own_key, own_value = _columns(key, parts.own), _columns(value, parts.own)
    out, weight = _fused(rows, own_key, own_value, scale, parts.own_bias)
    if parts.text.stop > parts.text.start:
        text_key, text_value = key[:, :, parts.text], value[:, :, parts.text]
        text, text_weight = _fused(rows, text_key, text_value, scale, parts.text_bias)
        share = (text_weight - weight).sigmoid().nan_to_num_(0.0)[..., None]  # not a number where both are −inf
        out = out.lerp(text, share.to(out.dtype))
    return out.reshape(*query.shape[:3], -1)


def _columns(x: Tensor, columns: Tensor) -> Tensor:
    """Return columns ``[b, Y]`` of keys or values ``[b, g, L, d]``: ``[b, g, Y, d]``."""
    if len(x) == 1:
        return x.index_select(2, columns[0])
    return x.transpose(1, 2)[torch.arange(len(x), device=x.device)[:, None], columns].transpose(1, 2)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None = None, *, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Return attention ``[b, g, R, d]`` and the logarithm of the sum of its exponentials, ``[b, g, R]``.

    Rows that see nothing, or have no score above −inf, are 0, and −inf.
    """
    out, weight = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    # PyTorch says 0 there, which may also be the sum's logarithm.
    if bias is not None:
        weight = weight.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
    unclear = weight == 0
    for slot, head in unclear.any(-1).nonzero().tolist():
        rows = unclear[slot, head].nonzero()[:, 0]
        scores = query[slot, head, rows] @ key[slot, head].mT * scale
        if bias is not None:
            scores = scores + bias.expand(*weight.shape, -1)[slot, head, rows]
        if causal:
            later = torch.arange(key.shape[2], device=key.device) > rows[:, None]
            scores = scores.masked_fill(later, -torch.inf)
        weight[slot, head, rows] = weight[slot, head, rows].masked_fill(scores.amax(-1) == -torch.inf, -torch.inf)
    return out, weight


def _check(
    query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, sinks: Tensor | None, block_table: Tensor | None
) -> None:
    slots, heads, length, d = query.shape
    _, groups, columns, _ = key.shape
    if heads % groups or key.shape[3] != d or value.shape[:3] != key.shape[:3]:
        raise ValueError(
            f"query must be [b, h, T, d], key [b, g, L, d] and value [b, g, L, dv], with g a divisor of h, got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    if block_table is None:
        held = len(key)
    else:
        held, columns = len(block_table), columns * block_table.shape[1]
    if len(mask.prefix) != slots or held != slots:
        raise ValueError(f"query has {slots} slots, mask {len(mask.prefix)} and keys {held}")
    rows = [part.shape[1] for part in (mask.seen, mask.first) if part is not None]
    if any(count != length for count in rows):
        raise ValueError(f"query has {length} rows, and the mask's seen and first have {rows}")
    if mask.seen is not None and mask.seen.shape[2] > columns:
        raise ValueError(f"a tree of {mask.seen.shape[2]} keys does not fit into {columns} columns of keys")
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must be [h] = [{heads}], got {list(sinks.shape)}")

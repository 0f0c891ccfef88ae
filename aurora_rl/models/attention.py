"""Attention of a target's layers in inference form: to the texts and the trees of slots, registered in transformers."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from aurora_kernels import TreeMask, tree_attention

GROUPED_ATTENTION = "aurora_rl_grouped"
# Tensors that transformers hands to attention, and that are no terms of it.
_NO_TERMS = ("position_ids", "cache_position")


class PassMask(Tensor):
    """A :class:`TreeMask` as transformers passes masks on to the layers: a tensor of four dimensions, without values.

    Attributes:
        tree_mask: The mask.

    Example:
        >>> PassMask.of(TreeMask(torch.tensor([7])), length=3).shape
        torch.Size([1, 1, 3, 0])
    """

    tree_mask: TreeMask

    @classmethod
    def of(cls, mask: TreeMask, length: int) -> Self:
        """Wrap the mask of a pass over ``length`` tokens of each slot."""
        carrier = mask.prefix.new_empty(len(mask.prefix), 1, length, 0).as_subclass(cls)
        carrier.tree_mask = mask
        return carrier


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    ancestors: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by :func:`aurora_kernels.tree_attention`, as transformers calls attention.

    Args:
        module: The attention module; unused, transformers passes it.
        query: Queries, ``[b, heads, T, d]``.
        key: Keys, ``[b, groups, L, d]``.
        value: Values, ``[b, groups, L, dv]``.
        attention_mask: A :class:`PassMask`, or what transformers makes: ``[b, 1, T, L]`` bool, or None for a causal
            mask.
        scaling: Factor on the scores; None is ``d ** -0.5``.
        ancestors: Nodes that a node sees, if the pass is a text with trees after it; this and the mask then are as of
            :func:`text_and_trees`.
        softcap: Bound on the absolute value of a score (Gemma 2), or None.
        s_aux: Score of nothing for each head, ``[heads]``, that the softmax counts too (gpt-oss's sinks), or None.
        **kwargs: Further arguments that transformers passes.

    Returns:
        ``[b, T, heads, dv]`` and no weights.

    Raises:
        TypeError: Tensors are passed that this attention does not know, which would be left out of it.
    """
    if unknown := [name for name, term in kwargs.items() if isinstance(term, Tensor) and name not in _NO_TERMS]:
        raise TypeError(f"attention has terms that {GROUPED_ATTENTION} does not know: {', '.join(unknown)}")
    if ancestors is not None:
        assert attention_mask is not None and scaling is not None
        return text_and_trees(query, key, value, attention_mask[:, 0], ancestors, scaling), None
    if isinstance(attention_mask, PassMask):
        mask = attention_mask.tree_mask
    else:
        before = key.shape[2] - query.shape[2] if attention_mask is None else 0
        prefix = torch.full((len(query),), before, device=query.device)
        seen = None if attention_mask is None else attention_mask[:, 0].expand(len(query), -1, -1)
        mask = TreeMask(prefix, seen)
    out = tree_attention(query, key, value, mask, scale=scaling, softcap=softcap, sinks=s_aux)
    # Some layers take a view of it, and the others would copy it themselves.
    return out.transpose(1, 2).contiguous(), None


def text_and_trees(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, ancestors: Tensor, scaling: float
) -> Tensor:
    """Attend from ``S`` tokens of a text, causally, and from ``N`` nodes of trees that leave the text.

    A node sees the text up to where its path leaves it, and its path. Scores of nodes are ``[N, S + J]`` and not
    ``[N, S + N]``: training has thousands of nodes, with paths of a few.

    Args:
        query: Queries, ``[b, heads, S + N, d]``.
        key: Keys, ``[b, groups, S + N, d]``.
        value: Values, ``[b, groups, S + N, d]``.
        seen: Tokens of the text that a node sees, ``[b, N, S]`` bool.
        ancestors: Nodes that a node sees, itself included, padded by −1, ``[b, N, J]`` int64.
        scaling: Factor on the scores.

    Returns:
        ``[b, S + N, heads, d]``.
    """
    (b, heads, _, d), (_, nodes, path), groups = query.shape, ancestors.shape, key.shape[1]
    size = seen.shape[2]
    text_query, text_key, text_value = (part[:, :, :size] for part in (query, key, value))
    text = F.scaled_dot_product_attention(
        text_query, text_key, text_value, is_causal=True, scale=scaling, enable_gqa=heads > groups
    )
    asks = query[:, :, size:].reshape(b, groups, heads // groups, nodes, d) * scaling
    at = ancestors.clamp(min=0).flatten(1)[:, None, :, None].expand(-1, groups, -1, d)
    keys, values = (part[:, :, size:].gather(2, at).view(b, groups, nodes, path, d) for part in (key, value))
    scores = torch.cat(
        [
            torch.einsum("bgrnd,bgsd->bgrns", asks, text_key).masked_fill(~seen[:, None, None], -torch.inf),
            torch.einsum("bgrnd,bgnjd->bgrnj", asks, keys).masked_fill(ancestors[:, None, None] < 0, -torch.inf),
        ],
        dim=-1,
    )
    to_text, to_path = scores.softmax(-1).to(value.dtype).split([size, path], dim=-1)
    tree = torch.einsum("bgrns,bgsd->bgrnd", to_text, text_value)
    tree = tree + torch.einsum("bgrnj,bgnjd->bgrnd", to_path, values)
    return torch.cat([text, tree.reshape(b, heads, nodes, d).to(text.dtype)], dim=2).transpose(1, 2)


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
# So that a model in this form still takes what transformers' own code gives it: no mask, or one of padding.
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)

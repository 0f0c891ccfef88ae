"""Attention to texts and trees, registered in transformers: of a target in inference form, of a drafter in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from aurora_kernels import TreeMask, tree_attention, tree_training_attention

GROUPED_ATTENTION = "aurora_rl_grouped"
# Tensors that transformers hands to attention, and that are no terms of it.
_NO_TERMS = ("position_ids", "cache_position")


class TextAndTrees(NamedTuple):
    """Mask of a pass over texts and, after each, the nodes of its trees.

    Attributes:
        text_seen: Tokens of the text that a node sees, ``[b, N]`` int64.
        ends: One past the last node of the subtree of each node, ``[b, N]`` int64; see ``tree_training_attention``.
    """

    text_seen: Tensor
    ends: Tensor


class PassMask(Tensor):
    """A mask as transformers passes it on to the layers: a tensor of four dimensions, without values.

    Attributes:
        seen: What the tokens of the pass see.

    Example:
        >>> PassMask.of(TreeMask(torch.tensor([7])), torch.tensor([[3, 1, 4]])).shape
        torch.Size([1, 1, 3, 0])
    """

    seen: TreeMask | TextAndTrees

    @classmethod
    def of(cls, seen: TreeMask | TextAndTrees, tokens: Tensor) -> Self:
        """Wrap the mask of a pass over ``tokens`` ``[b, T]``, whose shape and device count."""
        carrier = tokens.new_empty(len(tokens), 1, tokens.shape[1], 0).as_subclass(cls)
        carrier.seen = seen
        return carrier


class PartMasks(Tensor):
    """The masks of a pass of several parts, as transformers passes it on: a tensor of four dimensions, without values.

    Attributes:
        parts: Mask of each part.

    Example:
        >>> masks = PartMasks.of([torch.ones(2, 1, 3, 9), torch.ones(1, 1, 4, 7)])
        >>> masks.shape, [mask.shape[2] for mask in masks_by_part(masks)]
        (torch.Size([2, 1, 0, 0]), [3, 4])
    """

    parts: Sequence[Tensor]

    @classmethod
    def of(cls, parts: Sequence[Tensor]) -> Tensor:
        """Return the mask of a pass of these parts; that of a single part is its own."""
        if len(parts) == 1:
            return parts[0]
        carrier = parts[0].new_empty(len(parts[0]), 1, 0, 0).as_subclass(cls)
        carrier.parts = parts
        return carrier


def masks_by_part(mask: Tensor | None) -> Sequence[Tensor | None]:
    """Return the mask of each part of a pass, which may have a single one."""
    return mask.parts if isinstance(mask, PartMasks) else [mask]


def pass_mask(
    depth: Tensor,
    past: Tensor,
    end: int,
    first: Callable[[Tensor], Tensor] | None,
    *,
    seen: Tensor | None,
    implementation: str,
    dtype: torch.dtype,
) -> Tensor:
    """Return what each token of a pass sees, in the form that an implementation of attention reads.

    Args:
        depth: A token's distance from ``past``, ``[b, T]`` int64.
        past: First column that the pass writes, ``[b, 1]`` int64.
        end: Columns that the pass reads.
        first: Returns the first position that tokens at some positions see; None if they see the whole text.
        seen: Which tokens of the pass a token sees, ``[b, T, T]`` bool; None if those up to itself.
        implementation: :data:`GROUPED_ATTENTION`, "sdpa" or "eager".
        dtype: Dtype of the model's scores.

    Returns:
        A :class:`PassMask` for :data:`GROUPED_ATTENTION`, otherwise ``[b, 1, T, end]``: bool for "sdpa", or what is
        added to the scores, in ``dtype``.
    """
    if first is None:
        mask = TreeMask(past[:, 0], seen)
    else:
        own = depth[:, :, None] >= depth[:, None] if seen is None else seen
        start = first(past + depth)
        mask = TreeMask(past[:, 0], own & ((past + depth)[:, None] >= start[:, :, None]), start)
    if implementation == GROUPED_ATTENTION:
        return PassMask.of(mask, depth)
    dense = mask.dense(depth.shape[1], end)[:, None]
    if implementation == "sdpa":
        return dense
    return torch.where(dense, torch.zeros((), dtype=dtype, device=dense.device), torch.finfo(dtype).min)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend by the kernels for trees, as transformers calls attention.

    Args:
        module: The attention module; unused, transformers passes it.
        query: Queries, ``[b, heads, T, d]``.
        key: Keys, ``[b, groups, L, d]``.
        value: Values, ``[b, groups, L, dv]``.
        attention_mask: A :class:`PassMask`, or what transformers makes: ``[b, 1, T, L]`` bool, or None for a causal
            mask.
        scaling: Factor on the scores; None is ``d ** -0.5``.
        softcap: Bound on the absolute value of a score (Gemma 2), or None.
        s_aux: Score of nothing for each head, ``[heads]``, that the softmax counts too (gpt-oss's sinks), or None.
        **kwargs: Further arguments that transformers passes.

    Returns:
        ``[b, T, heads, dv]`` and no weights.

    Raises:
        TypeError: Tensors are passed that this attention does not know, which would be left out of it.
    """
    if unknown := [name for name, term in kwargs.items() if isinstance(term, Tensor) and name not in _NO_TERMS]:
        raise TypeError(
            f"attention has terms that {GROUPED_ATTENTION} does not know: {', '.join(unknown)}; attend by "
            "transformers' own form, with model.set_attn_implementation('sdpa') or 'eager'"
        )
    if isinstance(attention_mask, PassMask):
        mask = attention_mask.seen
    else:
        before = key.shape[2] - query.shape[2] if attention_mask is None else 0
        seen = None if attention_mask is None else attention_mask[:, 0].expand(len(query), -1, -1)
        mask = TreeMask(torch.full((len(query),), before, device=query.device), seen)
    if isinstance(mask, TextAndTrees):
        out = tree_training_attention(query, key, value, *mask, scale=scaling)
    else:
        out = tree_attention(query, key, value, mask, scale=scaling, softcap=softcap, sinks=s_aux)
    # Some layers take a view of it, and the others would copy it themselves.
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
# So that a model in this form still takes what transformers' own code gives it: no mask, or one of padding.
AttentionMaskInterface.register(GROUPED_ATTENTION, sdpa_mask)

"""A model in inference form whose logits for a token do not depend, bit for bit, on what else is in the pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from aurora_kernels.batch_invariant import (
    KEY_BLOCK,
    Product,
    in_sizes,
    invariant_attention,
    invariant_elementwise,
    invariant_sizes,
)
from aurora_rl.models.inference_modules import FusedDecoderLayer, PackedLinear


class BatchInvariantLinear(nn.Module):
    """A linear layer, packed or not, that is called with numbers of rows which it computes alike."""

    def __init__(self, linear: nn.Linear | PackedLinear) -> None:
        super().__init__()
        self.linear = linear
        weight, bias, threads = linear.weight, linear.bias is not None, torch.get_num_threads()
        packed = isinstance(linear, PackedLinear)
        self.sizes = _sizes(packed, weight.shape, weight.dtype, str(weight.device), bias, threads)

    @property
    def weight(self) -> Tensor:
        """``[out, in]``."""
        return self.linear.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return in_sizes(self.linear, x, self.sizes)


@functools.lru_cache
def _sizes(
    packed: bool, shape: torch.Size, dtype: torch.dtype, device: str, bias: bool, threads: int
) -> tuple[int, ...]:
    def product_of(weight: Tensor) -> Product:
        with torch.device("meta"):
            linear = nn.Linear(shape[1], shape[0], bias=bias)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias:
            linear.bias = nn.Parameter(weight.new_zeros(shape[0]), requires_grad=False)
        return PackedLinear(linear, keep_weight=False) if packed else linear

    with torch.inference_mode():
        return invariant_sizes(product_of, shape[0], shape[1], dtype, device)


class _Activation(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return invariant_elementwise(self.function, x)


def whole_blocks(columns: int, batch_invariant: bool) -> int:
    """Return how many columns a pass reads that needs so many: whole blocks where it is to be batch-invariant."""
    return -(-columns // KEY_BLOCK) * KEY_BLOCK if batch_invariant else columns


def invariant_mask(depth: Tensor, past: Tensor, end: int, first: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Return the mask of a pass whose tokens have the keys of their paths in order, ``[b * T, 1, 1, end]`` bool.

    Arguments are those of :func:`aurora_rl.models.attention.pass_mask`.
    """
    position, column = (past + depth).flatten()[:, None], torch.arange(end, device=depth.device)
    mask = column <= position
    return (mask if first is None else mask & (column >= first(position)))[:, None, None]


def make_batch_invariant(model: nn.Module) -> None:
    """Replace, in place, what rounds by the number of rows: products, activations and the attention of fused layers.

    The model is in inference form, all layers fused. Norms and embeddings treat rows alone as they are.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, PackedLinear) or type(child) is nn.Linear:
            setattr(model, name, BatchInvariantLinear(cast(nn.Linear, child)))
        elif not isinstance(child, BatchInvariantLinear):
            make_batch_invariant(child)
    if isinstance(model, FusedDecoderLayer) and not isinstance(model.act_fn, _Activation):
        model.act_fn, model.attend = _Activation(model.act_fn), _attend


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> tuple[Tensor, None]:
    """Attend as :func:`aurora_rl.models.attention.grouped_attention` does, each token by itself."""
    assert mask is not None
    return invariant_attention(query, key, value, mask, scaling), None

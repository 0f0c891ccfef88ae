"""Forms of a Hugging Face model's modules that decode faster and compute the same function.

On a CPU a decoding step of a small model is bound by the dispatch of many small operations and by reading weights in a
layout that the matrix kernels have to reorder each time; see benchmarks/decode.py for what each form gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

GROUPED_ATTENTION = "aurora_rl_grouped"


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of grouped queries without repeating keys and values: the queries of a group share rows of one head.

    Args:
        module: the attention module; unused, transformers passes it.
        query: ``[b, heads, T, d]``.
        key: ``[b, groups, L, d]``.
        value: ``[b, groups, L, d]``.
        attention_mask: ``[b, 1, heads / groups * T, L]`` bool, the ``T`` rows repeated for each head of a group.
        scaling: factor on the scores.
        **kwargs: what else transformers passes.

    Returns:
        ``[b, T, heads, d]`` and no weights.
    """
    b, heads, length, d = query.shape
    query = query.reshape(b, key.shape[1], -1, d)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(b, heads, length, d).transpose(1, 2), None


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)


class PackedLinear(nn.Module):
    """A bf16 linear layer whose weight is stored in oneDNN's blocked layout, reordered once and not at every call.

    Args:
        linear: the layer to replace.
        keep_weight: keep the plain weight too, so that it can be replaced; call :meth:`pack` after that.
    """

    def __init__(self, linear: nn.Linear, *, keep_weight: bool) -> None:
        super().__init__()
        self.weight: Tensor | None = linear.weight
        self.bias = linear.bias
        self.pack()
        if not keep_weight:
            self.weight = None

    def pack(self) -> None:
        """Reorder the current weight."""
        assert self.weight is not None, "made without keep_weight"
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


class FusedRMSNorm(nn.Module):
    """RMSNorm in one operation."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = weight, eps

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H]`` to ``[..., H]``."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


@torch.no_grad()
def _fused_norm(module: nn.Module) -> FusedRMSNorm | None:
    """The fused form of a norm, if the module is one: names are no proof (Gemma scales by 1 + weight), a probe is."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.ndim != 1 or eps is None:
        return None
    fused = FusedRMSNorm(weight, eps)
    probe = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype, device=weight.device)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return fused if torch.allclose(fused(probe), module(probe), rtol=tolerance, atol=tolerance) else None


def _is_packable(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def prepare_for_inference(model: nn.Module, *, keep_weights: bool = False) -> None:
    """Replace modules by their faster forms, in place.

    RMSNorms are fused on every device; linear layers are packed where the CPU multiplies bf16 natively.

    Args:
        model: the module to change.
        keep_weights: keep the plain weights of packed layers, for a module whose weights will be replaced (see
            :func:`repack`). Otherwise they are dropped: take what you need of them before.
    """
    pack = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    for name, child in list(model.named_children()):
        norm = _fused_norm(child)
        if norm is not None:
            setattr(model, name, norm)
        elif pack and isinstance(child, nn.Linear) and _is_packable(child.weight):
            setattr(model, name, PackedLinear(child, keep_weight=keep_weights))
        else:
            prepare_for_inference(child, keep_weights=keep_weights)


def repack(model: nn.Module) -> None:
    """Bring packed layers up to date after their weights were replaced."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.pack()

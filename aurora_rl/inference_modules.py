"""Forms of a Hugging Face model's modules that decode faster and compute the same function.

On a CPU a decoding step of a small model is bound by the dispatch of many small operations and by reading weights in a
layout that the matrix kernels have to reorder each time; see benchmarks/decode.py for what each form gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, DynamicCache

GROUPED_ATTENTION = "aurora_rl_grouped"


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    ancestors: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of grouped queries without repeating keys and values: the queries of a group share rows of one head.

    Args:
        module: the attention module; unused, transformers passes it.
        query: ``[b, heads, T, d]``.
        key: ``[b, groups, L, d]``.
        value: ``[b, groups, L, d]``.
        attention_mask: ``[b, 1, heads / groups * T, L]`` bool, the ``T`` rows repeated for each head of a group.
        scaling: factor on the scores.
        ancestors: given where the pass is a text with trees behind it; this and the mask then are as of
            :func:`text_and_trees`.
        **kwargs: what else transformers passes.

    Returns:
        ``[b, T, heads, d]`` and no weights.
    """
    if ancestors is not None:
        return text_and_trees(query, key, value, attention_mask[:, 0], ancestors, scaling), None
    b, heads, length, d = query.shape
    query = query.reshape(b, key.shape[1], -1, d)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(b, heads, length, d).transpose(1, 2), None


def text_and_trees(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, ancestors: Tensor, scaling: float
) -> Tensor:
    """Attention over ``S`` tokens of a text, each after those before it, and ``N`` nodes of trees that leave the text.

    A node sees the text up to where its path leaves it, and its path. Scores of nodes are ``[N, S + J]`` and not
    ``[N, S + N]``: training has thousands of nodes, with paths of a few.

    Args:
        query: ``[b, heads, S + N, d]``.
        key: ``[b, groups, S + N, d]``.
        value: ``[b, groups, S + N, d]``.
        seen: ``[b, N, S]`` bool, the tokens of the text that a node sees.
        ancestors: ``[b, N, J]`` int64, the nodes that a node sees, itself included; −1 fills up.
        scaling: factor on the scores.

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


def grouped_mask(mask: Tensor, groups: int) -> Tensor:
    """A mask ``[b, T, L]`` as :func:`grouped_attention` reads it, where ``groups`` heads share a key head."""
    return mask.repeat(1, groups, 1)[:, None]


class PackedLinear(nn.Module):
    """A bf16 linear layer whose weight is stored in oneDNN's blocked layout, reordered once and not at every call.

    Args:
        linear: the layer to replace.
        keep_weight: keep the plain weight too, so that it can be replaced, see :func:`stage`.
    """

    def __init__(self, linear: nn.Linear, *, keep_weight: bool) -> None:
        super().__init__()
        self.weight: Tensor | None = linear.weight
        self.bias = linear.bias
        self.packed = self.pack(linear.weight.detach())
        if not keep_weight:
            self.weight = None

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """``[out, in]`` in the blocked layout."""
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in]`` to ``[..., out]``."""
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


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


def _join(layers: Sequence[nn.Linear]) -> nn.Linear:
    """One linear layer whose outputs are those of ``layers``, end to end."""
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    with torch.device("meta"):
        joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=bias is not None)
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    if bias is not None:
        joined.bias = nn.Parameter(bias, requires_grad=False)
    return joined


class FusedDecoderLayer(nn.Module):
    """A pre-norm decoder layer with gated MLP (Llama, Qwen, Mistral, ...) in fewer operations.

    Queries, keys and values are one product and rotated together, gate and up another. It takes what transformers
    passes to a decoder layer, an attention mask as :func:`grouped_attention` reads it and a cache.

    Args:
        layer: the layer to replace.

    Raises:
        AttributeError: the layer is not made of the parts that this form knows. Whether it computes the same is for
            the caller to see, as :func:`fuse_decoder_layers` does.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self._num_heads = attention.q_proj.out_features // attention.head_dim
        self._num_key_heads = attention.k_proj.out_features // attention.head_dim
        self._index, self._scaling, self._head_dim = attention.layer_idx, attention.scaling, attention.head_dim
        self.qkv_proj = _join([attention.q_proj, attention.k_proj, attention.v_proj])
        self.gate_up_proj = _join([mlp.gate_proj, mlp.up_proj])
        self.o_proj, self.down_proj, self.act_fn = attention.o_proj, mlp.down_proj, mlp.act_fn
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm: Any = getattr(attention, "q_norm", None)
        self.k_norm: Any = getattr(attention, "k_norm", None)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache,
        **kwargs: Any,
    ) -> Tensor:
        """``[b, T, H]`` to ``[b, T, H]``.

        Args:
            hidden_states: ``[b, T, H]``.
            attention_mask: see :func:`grouped_attention`.
            position_embeddings: cosines and sines, each ``[b, T, d]``.
            past_key_values: the cache.
            **kwargs: what else transformers passes.
        """
        b, length, _ = hidden_states.shape
        heads, turns = self._num_heads, self._num_heads + self._num_key_heads
        qkv = self.qkv_proj(self.input_layernorm(hidden_states)).view(b, length, -1, self._head_dim)
        turned, value = qkv[:, :, :turns], qkv[:, :, turns:]
        if self.q_norm is not None:
            turned = torch.cat([self.q_norm(turned[:, :, :heads]), self.k_norm(turned[:, :, heads:])], dim=2)
        cos, sin = (part[:, :, None] for part in position_embeddings)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        key, value = past_key_values.update(turned[:, :, heads:].transpose(1, 2), value.transpose(1, 2), self._index)
        query = turned[:, :, :heads].transpose(1, 2)
        out, _ = grouped_attention(self, query, key, value, attention_mask, self._scaling)
        hidden_states = hidden_states + self.o_proj(out.reshape(b, length, -1))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(hidden_states)).chunk(2, dim=-1)
        return hidden_states + self.down_proj(self.act_fn(gate) * up)


def fuse_decoder_layers(layers: nn.ModuleList, groups: int) -> None:
    """Replace, in place, the decoder layers that :class:`FusedDecoderLayer` computes the same as; leave the others.

    Args:
        layers: of a model whose attention is :data:`GROUPED_ATTENTION`.
        groups: heads that share a key head.
    """
    for index, layer in enumerate(layers):
        if (fused := _fused_layer(layer, groups)) is not None:
            layers[index] = fused


@torch.no_grad()
def _fused_layer(layer: Any, groups: int) -> FusedDecoderLayer | None:
    """The fused form of a layer, if there is one: as for norms, a probe and not the name tells."""
    try:
        fused = FusedDecoderLayer(layer)
        weight, length = layer.self_attn.q_proj.weight, 3
        generator = torch.Generator().manual_seed(0)
        x, cos, sin = (
            torch.randn(1, length, size, generator=generator).to(weight)
            for size in (weight.shape[1], layer.self_attn.head_dim, layer.self_attn.head_dim)
        )
        mask = grouped_mask(torch.ones(1, length, length, dtype=torch.bool, device=x.device).tril(), groups)
        same, given = (
            form(
                x,
                attention_mask=mask,
                position_embeddings=(cos, sin),
                # An empty cache, of which this layer is the only one.
                past_key_values=DynamicCache(),
                position_ids=torch.arange(length, device=x.device)[None],
                use_cache=True,
            )
            for form in (fused, layer)
        )
    except Exception:  # a layer of other parts, or one that is called in another way
        return None
    scale = 16 * torch.finfo(x.dtype).eps * float(given.abs().max())
    return fused if torch.allclose(same, given, rtol=0, atol=scale) else None


def _is_packable(weight: Tensor) -> bool:
    return weight.dtype == torch.bfloat16 and weight.device.type == "cpu"


def prepare_for_inference(model: nn.Module, *, keep_weights: bool = False) -> None:
    """Replace modules by their faster forms, in place.

    RMSNorms are fused on every device; linear layers are packed where the CPU multiplies bf16 natively.

    Args:
        model: the module to change.
        keep_weights: keep the plain weights of packed layers, for a module whose weights will be replaced (see
            :func:`stage`). Otherwise they are dropped: take what you need of them before.
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


@torch.no_grad()
def stage(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[], None]:
    """Copy new weights into the dtypes, devices and layouts of a model that goes on with its old ones.

    Args:
        model: may be in inference form.
        weights: by the names of its state dict.

    Returns:
        Puts the copies in place. Nothing is copied then: parameters point to other memory.
    """
    put: list[tuple[Any, str, Tensor]] = []
    for name, old in model.state_dict(keep_vars=True).items():
        new = torch.empty_like(old).copy_(weights[name])
        put.append((old, "data", new))
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, PackedLinear) and old is owner.weight:
            put.append((owner, "packed", owner.pack(new)))

    def install() -> None:
        for holder, attribute, new in put:
            setattr(holder, attribute, new)

    return install

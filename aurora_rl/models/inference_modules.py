"""Forms of a Hugging Face model's modules that decode faster and compute the same function.

Two things bound a decoding step of a small model on a CPU. One is the dispatch of many small operations, the other
weights in a layout that the matrix kernels reorder at each step. benchmarks/decode.py measures what each form gives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from typing_extensions import override

from aurora_rl.models.attention import grouped_attention, masks_by_part
from aurora_rl.models.kv_cache import SlotCache


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in oneDNN's blocked layout, reordered once and not at every call.

    ``keep_weight`` keeps the plain weight too, so that :func:`stage` can replace it. The packed one follows it at once
    when a state dict is loaded and when the module is copied, cast or moved, so that no round waits for that. It
    follows other writes at the next call, if torch counts them; ``aurora_rl.models.weight_watch`` notices those to
    ``.data``, too. Where gradients are wanted the plain weight multiplies: none go through a packed one.
    """

    packed: Tensor | None
    _packed_from: tuple[Tensor, int] | None = None  # the plain weight, and how often torch had counted a write to it

    def __init__(self, linear: nn.Linear, *, keep_weight: bool) -> None:
        super().__init__()
        if keep_weight:  # first, as in a linear layer: some pair parameters by their order
            # As register_parameter does, which refuses a name that the class has already.
            self._parameters["weight"] = linear.get_parameter("weight")
        self.bias = linear.bias
        self.packed = None if keep_weight else self.pack(linear.weight.detach())
        self.repack()

    @property
    def weight(self) -> Tensor:
        """``[out, in]``, unpacked at every call unless it was kept: some attention reads weights by itself."""
        if (kept := self._parameters.get("weight")) is not None:
            return kept
        assert self.packed is not None
        return self.packed.to_dense()

    @staticmethod
    def pack(weight: Tensor) -> Tensor:
        """Return the weight ``[out, in]`` in the blocked layout."""
        return torch.ops.mkldnn._reorder_linear_weight(weight, None)

    def repack(self) -> None:
        """Pack the plain weight anew, if it was kept; one of another dtype or device is left plain."""
        if (kept := self._parameters.get("weight")) is not None:
            # A packed weight that was made in inference mode could not be copied outside of it.
            with torch.inference_mode(False), torch.no_grad():
                self.packed = self.pack(kept.detach()) if _is_packable(kept) else None
            self._packed_from = kept, writes_to(kept)

    @override
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.repack()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the packed weight out of copies if the plain one was kept: torch cannot copy it."""
        kept = self._parameters.get("weight")
        return vars(self) | ({} if kept is None else {"packed": None, "_packed_from": None})

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.repack()

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        if (kept := self._parameters.get("weight")) is not None:
            if kept.requires_grad and torch.is_grad_enabled():
                return nn.functional.linear(x, kept, self.bias)
            if self._packed_from is None or self._packed_from[0] is not kept or self._packed_from[1] != writes_to(kept):
                self.repack()
        if self.packed is None:
            return nn.functional.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def writes_to(tensor: Tensor) -> int:
    """Return how many writes torch has counted; it counts none to a tensor that was made in inference mode.

    Example:
        >>> writes_to(torch.zeros(2).add_(1))
        1
    """
    try:
        return tensor._version
    except RuntimeError:  # also where other memory was assigned to its `.data`, which `is_inference` does not tell
        return 0


def _is_packable(weight: Tensor) -> bool:
    """Return whether oneDNN multiplies weights of this dtype natively on this CPU."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return weight.dtype == torch.float32 or (
        weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@torch.no_grad()
def _fused_norm(module: nn.Module) -> nn.RMSNorm | None:
    """Return torch's norm, one operation, for a module that a probe finds to be one: Gemma's scales by 1 + weight."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.ndim != 1 or eps is None:
        return None
    fused = nn.RMSNorm(weight.shape, eps=eps, device="meta")
    fused.weight = weight
    probe = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype, device=weight.device)
    tolerance = 4 * torch.finfo(weight.dtype).eps
    return fused if torch.allclose(fused(probe), module(probe), rtol=tolerance, atol=tolerance) else None


@torch.no_grad()
def _join(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Return a linear layer whose outputs are those of ``layers``, end to end. They become views of it."""
    with torch.device("meta"):
        joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False)
    joined.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
    for layer, rows in zip(layers, joined.weight.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = rows
    if layers[0].bias is not None:
        joined.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]), requires_grad=False)
    return joined


class FusedDecoderLayer(nn.Module):
    """A pre-norm decoder layer with gated MLP (Llama, Qwen, Mistral, ...) in fewer operations.

    Queries, keys and values are one product and rotated together, gate and up another. It takes what transformers
    passes to a decoder layer, an attention mask as :func:`grouped_attention` reads it and a cache. The pass may be
    without padding and of several parts (see :meth:`SlotCache.aim`): attention alone needs to know whose rows they are.

    Attributes:
        attend: Attention, :func:`grouped_attention` unless it is replaced.

    Raises:
        AttributeError: The layer to replace has other parts than this form knows. Whether it computes the same is for
            the caller to check, as :func:`fuse_decoder_layers` does.
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
        self.attend: Callable[..., tuple[Tensor, None]] = grouped_attention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Cache | None,
        **kwargs: Any,
    ) -> Tensor:
        """Turn ``[b, T, H]`` into ``[b, T, H]``, with cosines and sines ``[b, T, d]`` as ``position_embeddings``."""
        b, length, _ = hidden_states.shape
        heads, turns = self._num_heads, self._num_heads + self._num_key_heads
        qkv = self.qkv_proj(self.input_layernorm(hidden_states)).view(b, length, -1, self._head_dim)
        turned, value = qkv[:, :, :turns], qkv[:, :, turns:]
        if self.q_norm is not None:
            turned = torch.cat([self.q_norm(turned[:, :, :heads]), self.k_norm(turned[:, :, heads:])], dim=2)
        cos, sin = (part[:, :, None] for part in position_embeddings)
        first, second = turned.chunk(2, dim=-1)
        # Some families have float32 cosines whatever the dtype.
        turned = (turned * cos + torch.cat([-second, first], dim=-1) * sin).to(qkv.dtype)
        query, key, value = turned[:, :, :heads], turned[:, :, heads:].transpose(1, 2), value.transpose(1, 2)
        if isinstance(past_key_values, SlotCache):
            past_key_values.write(self._index, key, value)
            out = self._attend_by_parts(query, attention_mask, past_key_values)
        else:
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self._index)
            out, _ = self.attend(self, query.transpose(1, 2), key, value, attention_mask, self._scaling)
        hidden_states = hidden_states + self.o_proj(out.reshape(b, length, -1))
        gate, up = self.gate_up_proj(self.post_attention_layernorm(hidden_states)).chunk(2, dim=-1)
        return hidden_states + self.down_proj(self.act_fn(gate) * up)

    def _attend_by_parts(self, query: Tensor, attention_mask: Tensor | None, cache: SlotCache) -> Tensor:
        """Attend from queries ``[b, T, heads, d]`` of a pass, each part of it to the keys of its own slots."""
        out = []
        for part, (rows, mask) in enumerate(zip(cache.unpack(query), masks_by_part(attention_mask), strict=True)):
            key, value = cache.read(self._index, part)
            out.append(self.attend(self, rows.transpose(1, 2), key, value, mask, self._scaling)[0])
        return cache.pack(*out)


Rotary = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Cosines and sines, each ``[b, T, d]``, of states ``[b, T, H]`` at positions ``[b, T]``."""


def fuse_decoder_layers(layers: nn.ModuleList, rotary: Rotary, far: int) -> Callable[[], None] | None:
    """Replace, in place, the decoder layers that :class:`FusedDecoderLayer` computes the same as; leave the others.

    Args:
        layers: Layers of a model whose attention is :data:`GROUPED_ATTENTION`.
        rotary: Rotary embedding of the model.
        far: Last position that the model will be asked for.

    Returns:
        A function that puts back the layers that were replaced; None if no layer is fused, now or before.
    """
    replaced, alike = {}, {}
    for index, layer in enumerate(layers):
        kind = layer_kind(layer)
        if kind not in alike:
            alike[kind] = _can_be_fused(layer, rotary, far)
        if alike[kind]:
            replaced[index], layers[index] = layer, FusedDecoderLayer(layer)

    def undo() -> None:
        for index, layer in replaced.items():
            layers[index] = layer

    return undo if any(isinstance(layer, FusedDecoderLayer) for layer in layers) else None


def layer_kind(layer: nn.Module) -> tuple[Any, ...]:
    """Return a key that is equal for layers that compute the same function of their weights, to probe them once."""
    settings = tuple(
        (name, key, value)
        for name, module in layer.named_modules()
        for key, value in sorted(vars(module).items())
        if isinstance(value, bool | int | float | str | type(None)) and key not in ("layer_idx", "training")
    )
    return type(layer), settings, tuple((name, parameter.shape) for name, parameter in layer.named_parameters())


@torch.no_grad()
def _can_be_fused(layer: Any, rotary: Rotary, far: int) -> bool:
    """Probe whether the fused form of a layer computes the same, in float32, where nothing hides in rounding."""
    try:
        layer = copy.deepcopy(layer)
        layer = layer if layer.self_attn.q_proj.weight.dtype == torch.float64 else layer.float()
        weight = layer.self_attn.q_proj.weight
        x = torch.randn(1, 4, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        positions = torch.tensor([[0, 1, far // 2, far]], device=x.device)
        arguments = dict(position_embeddings=rotary(x, positions), position_ids=positions, use_cache=False)
        attention, mlp = layer.self_attn, layer.mlp
        projections = [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        own = _outputs(layer, projections, x, arguments)
        fused = FusedDecoderLayer(layer)
        fused_outputs = _outputs(fused, [fused.qkv_proj, fused.gate_up_proj], x, arguments)
    except Exception:  # a layer of other parts, or one that is called in another way
        return False
    scale = 16 * torch.finfo(x.dtype).eps * own.abs().amax(dim=(1, 2), keepdim=True)
    return bool(((fused_outputs - own).abs() <= scale).all())


def _outputs(layer: nn.Module, projections: Sequence[nn.Module], x: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Return a layer's outputs, and those with far larger projections, where a clip or cap would show."""

    def run() -> Tensor:
        out = layer(x, attention_mask=None, past_key_values=None, **arguments)
        return out if isinstance(out, Tensor) else out[0]

    usual = run()
    with ExitStack() as hooks:
        for projection in projections:
            hooks.enter_context(projection.register_forward_hook(lambda module, args, out: out * 64))
        return torch.cat([usual, run()])


def prepare_for_inference(model: nn.Module, *, keep_weights: bool = False) -> None:
    """Replace modules by their faster forms, in place.

    RMSNorms are fused on every device; linear layers are packed on a CPU, in float32, and in bfloat16 where it
    multiplies that natively. The plain weights of packed layers are dropped, unless ``keep_weights`` keeps them to be
    replaced by :func:`stage`.
    """
    for name, child in list(model.named_children()):
        if (norm := _fused_norm(child)) is not None:
            setattr(model, name, norm)
        # Not subclasses, which may return more than a product, as routers do.
        elif type(child) is nn.Linear and _is_packable(child.weight):
            setattr(model, name, PackedLinear(child, keep_weight=keep_weights))
        else:
            prepare_for_inference(child, keep_weights=keep_weights)


@torch.no_grad()
def stage(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[], None]:
    """Copy new weights into the dtypes, devices and layouts of a model that goes on with its old ones.

    Args:
        model: Model, which may be in inference form.
        weights: New weights by the names of its state dict.

    Returns:
        A function that puts the copies in place, by reference.
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

"""The parts of the target that a drafter and its training need: embedding, head, final norm and last layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig, PreTrainedModel

from aurora_rl.models.target_head import TargetHead, context_length, decoder_layers, decoder_of

# Weights of a Llama layer that are copied, those of its outputs among them, and norms of heads.
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_PROJECTIONS = tuple(
    f"{name}_proj.weight"
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
)
_OUTPUTS = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
# Scale of the probe of a norm: far above every epsilon, and float16 holds its outliers.
_PROBE_SIZE = 4096.0
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
FIXED_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary settings whose frequencies do not depend on the length of the pass."""


@dataclass(frozen=True, slots=True)
class TargetParts:
    """References to frozen weights of a target, to be taken before an engine puts the model into inference form.

    Attributes:
        config: The target's (text) configuration.
        embedding: Input embedding, ``[V, H]``.
        head: The output head; its weight and ``embedding`` are one tensor if they are tied.
        norm: Factor of the final norm on normalised states, ``[H]``; None if the decoder ends without a norm.
        last_layer: Weights of the last decoder layer by their names in a Llama layer, those alone that a Llama layer
            has in this form. Norms are what they multiply by: Gemma stores this less 1.
        parameters: All parameters of the last decoder layer, by the family's own names.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> parts.head.weight.shape, parts.fingerprint == TargetParts.of(tiny_target(dtype=torch.float32)).fingerprint
        (torch.Size([32, 16]), True)
    """

    config: PretrainedConfig
    embedding: Tensor
    head: TargetHead
    norm: Tensor | None
    last_layer: dict[str, Tensor]
    parameters: dict[str, Tensor]

    @classmethod
    def of(cls, model: PreTrainedModel) -> TargetParts:
        """Read the parts of a Hugging Face causal LM.

        Raises:
            ValueError: The model has no list of decoder layers, :class:`TargetHead` cannot compute its logits, or its
                embedding or head is of another width than its layers (as in OPT-350m).
        """
        config, layer = model.config.get_text_config(), decoder_layers(model)[-1]
        embedding = model.get_input_embeddings().get_parameter("weight").detach()
        head = TargetHead.of(model)
        for name, width in (("embedding", embedding.shape[1]), ("output head", head.weight.shape[1])):
            if width != config.hidden_size:
                raise ValueError(
                    f"{type(model).__name__} has an {name} of width {width} and layers of width {config.hidden_size}; "
                    "drafters need them to be equal, so no drafter can be made for this target"
                )
        final, last, on_outputs = _norms(model, layer)
        own = {name: parameter.detach() for name, parameter in layer.named_parameters()}
        # A projection whose output is normalised has another scale than one that adds to the residual stream.
        last |= {name: own[name] for name in _PROJECTIONS if name in own and not (on_outputs and name in _OUTPUTS)}
        return cls(config=config, embedding=embedding, head=head, norm=final, last_layer=last, parameters=own)

    @property
    def digest(self) -> str:
        """Identity of the target's architecture: a digest of the configuration entries that shape it."""
        names = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads")
        return hashlib.blake2b(
            json.dumps({name: getattr(self.config, name, None) for name in names}).encode(), digest_size=8
        ).hexdigest()

    @property
    def fingerprint(self) -> str:
        """Identity of the target's weights, in any dtype: a digest of rows of the head and the last decoder layer.

        A target that was tuned further differs, even if its head did not change. Float32 weights that are loaded in
        float16 have a digest of their own, as the two roundings differ.
        """
        found = hashlib.blake2b(digest_size=8)
        weights = list(self.head.tensors().items())
        for name, weight in [*weights, *((name, self.parameters[name]) for name in sorted(self.parameters))]:
            if name in ("scale", "softcap"):  # numbers that only their names tell apart
                found.update(name.encode())
            rows = weight.reshape(-1, *weight.shape[-1:])  # a scalar is a row too
            # 64 to 127 of them, as both 16-bit dtypes have them: float16 has fewer digits of small weights.
            few = rows[:: max(len(rows) // 64, 1)].to("cpu", torch.bfloat16).half().bfloat16()
            found.update(few.contiguous().view(torch.int16).numpy().tobytes())
        return found.hexdigest()


def _norms(model: PreTrainedModel, layer: nn.Module) -> tuple[Tensor | None, dict[str, Tensor], bool]:
    """Find the weights of the norms that a drafter starts from, in a target and one of its decoder layers.

    Families give one name to different norms: "post_attention_layernorm" is before the MLP in Llama and before the
    residual sum in Gemma 2. So a norm is known by what reads its output in a pass.

    Returns:
        The final norm's weight ``[H]`` or None; weights of the layer's norms by their names in a Llama layer; and
        whether the layer normalises what its attention or its MLP adds to the residual stream.
    """
    decoder = decoder_of(model)
    seen: dict[nn.Module, tuple[Tensor, Any]] = {}

    def note_output(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        read = args[0] if args else kwargs.get("hidden_states")
        if isinstance(read, Tensor):
            seen[module] = read, output

    # NanoChat's norms of heads have no weight that tells their width, so their inputs are noted too.
    head_norms = [module for name, module in layer.named_modules() if name in _HEAD_NORMS]
    with torch.no_grad(), ExitStack() as hooks:
        for child in (*decoder.children(), *layer.children(), *head_norms):
            if not isinstance(child, nn.ModuleList):
                hooks.enter_context(child.register_forward_hook(note_output, with_kwargs=True))
        last = decoder(torch.arange(4, device=model.device)[None], use_cache=False).last_hidden_state

    def weight(module: nn.Module) -> Tensor | None:
        return norm_weight(module, last.shape[-1], model.dtype) if module in seen else None

    def reads(reader: nn.Module, module: nn.Module) -> bool:
        return reader in seen and seen[reader][0].data_ptr() == seen[module][1].data_ptr()

    final, on_outputs = None, False
    weights: dict[str, Tensor] = {}
    for child in decoder.children():
        if (found := weight(child)) is not None and seen[child][1].data_ptr() == last.data_ptr():
            final = found
    for child in layer.children():
        if (found := weight(child)) is None:
            continue
        readers = [name for name, reader in layer.named_children() if reads(reader, child)]
        on_outputs |= not readers
        for name in readers:
            # What is not attention is the MLP, or its first projection.
            norm = "input_layernorm.weight" if "att" in name.lower() else "post_attention_layernorm.weight"
            weights[norm] = found
    for name, module in layer.named_modules():
        if name in _HEAD_NORMS and module in seen:
            found = norm_weight(module, seen[module][0].shape[-1], model.dtype)
            weights |= {} if found is None else {f"{name}.weight": found}
    return final, weights, on_outputs


@torch.no_grad()
def norm_weight(norm: nn.Module, size: int, dtype: torch.dtype) -> Tensor | None:
    """Return the factor ``[size]`` that an RMSNorm or LayerNorm multiplies by, however it stores it; None for others.

    Its inputs have an even width ``size`` and this ``dtype``.

    Example:
        >>> norm_weight(nn.LayerNorm(2), 2, torch.float32), norm_weight(nn.Linear(2, 2), 2, torch.float32)
        (tensor([1., 1.]), None)
    """
    device = next((p.device for p in norm.parameters()), torch.device("cpu"))
    # Mean 0 and root mean square 1, so that both kinds of norm divide by the factor, which dwarfs epsilon.
    sign = torch.tensor([1.0, -1.0], dtype=dtype, device=device).repeat(size // 2)
    probe = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(sign)
    try:
        up, down, got = (norm(_PROBE_SIZE * x[None, None])[0, 0] for x in (sign, -sign, probe))
        weight, bias = (up - down) / 2 * sign, (up + down) / 2
        forms = [x / x.square().mean().sqrt() * weight + bias for x in (probe, probe - probe.mean())]
    except Exception:  # a module that is called in another way, or that changes the width
        return None
    # Norms compute in float32 whatever the dtype.
    tolerance = 16 * max(torch.finfo(t).eps for t in (dtype, torch.float32)) * float(1 + got.abs().max())
    same = any(form.shape == got.shape and float((form - got).abs().max()) <= tolerance for form in forms)
    return weight if same else None


@torch.no_grad()
def copy_layer(layer: nn.Module, last: Mapping[str, Tensor]) -> set[str]:
    """Start a drafter's layer from ``TargetParts.last_layer``, and return the names of the weights that were copied.

    Projections of queries, keys and values may read twice as much, the embedding first (EAGLE-3): they start blind to
    it. An attention or MLP that cannot be copied whole adds nothing to the residual stream until it has learned.
    """
    copied: set[str] = set()
    own = dict(layer.named_parameters())
    for name, weight in last.items():
        if name in own and own[name].shape == weight.shape:
            own[name].copy_(weight)
            copied.add(name)
        elif name in own and own[name].shape == (weight.shape[0], 2 * weight.shape[-1]):
            own[name].zero_()
            own[name][:, weight.shape[1] :] = weight
            copied.add(name)
    for output in _OUTPUTS:
        if not copied.issuperset(name for name in _PROJECTIONS if name.startswith(output.partition(".")[0])):
            own[output].zero_()
    return copied


def layer_config(parts: TargetParts) -> LlamaConfig:
    """Return a Llama layer's configuration of the target's sizes and rotary settings; usual ones for MLA and ALiBi.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> config = layer_config(TargetParts.of(tiny_target()))
        >>> config.num_hidden_layers, config.hidden_size
        (1, 16)
    """
    target = parts.config
    size = target.hidden_size
    # A Llama's heads divide its width.
    heads = next(number for number in range(target.num_attention_heads, 0, -1) if size % number == 0)
    inner = getattr(target, "intermediate_size", None)
    head_dim = None if getattr(target, "kv_lora_rank", None) else getattr(target, "head_dim", None)
    return LlamaConfig.from_dict(
        {
            "hidden_size": size,
            "intermediate_size": inner if isinstance(inner, int) else 4 * size,
            "num_attention_heads": heads,
            "num_key_value_heads": _key_heads(target, heads),
            # Rotary positions turn pairs.
            "head_dim": head_dim or max(size // heads // 2, 1) * 2,
            "num_hidden_layers": 1,
            "rms_norm_eps": next((e for name in _EPSILONS if (e := getattr(target, name, None)) is not None), 1e-6),
            "rope_parameters": _layer_rope(target),
            "vocab_size": target.vocab_size,
            "tie_word_embeddings": False,
            **target_entries(parts),
        }
    )


def _key_heads(config: PretrainedConfig, heads: int) -> int:
    """Return the number of key heads of a model if it divides ``heads``; Falcon and GPTBigCode name it differently."""
    found = getattr(config, "num_key_value_heads", None)
    if found is None and getattr(config, "new_decoder_architecture", False):
        found = config.num_kv_heads
    elif found is None and getattr(config, "multi_query", False):
        found = 1
    return found if found and heads % found == 0 else heads


def _layer_rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the target's rotary settings, of full attention and the whole head, if they are the same at any length."""
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope = dict(rope.get("full_attention") or next((v for v in rope.values() if isinstance(v, dict)), rope))
    rope.pop("partial_rotary_factor", None)
    theta = rope.get("rope_theta") or 10000.0
    if rope.get("rope_type", "default") not in FIXED_ROPE:
        return {"rope_type": "default", "rope_theta": theta}
    return {"rope_type": "default", **{name: v for name, v in rope.items() if v is not None}, "rope_theta": theta}


def target_entries(parts: TargetParts) -> dict[str, Any]:
    """Return the entries of a drafter's configuration that are the target's, whatever a file says.

    A file often gives the length of its training; positions are computed here, up to the target's last.
    """
    target = parts.config
    entries = {
        "max_position_embeddings": context_length(target),
        **{name: getattr(target, name, None) for name in ("bos_token_id", "eos_token_id")},
        "num_target_layers": target.num_hidden_layers,
    }
    return {name: value for name, value in entries.items() if value is not None}


def default_feature_layers(num_layers: int) -> tuple[int, ...]:
    """Return EAGLE-3's early, middle and late layers, as SGLang reads them: 2, n // 2, n − 3; fewer in tiny models.

    >>> default_feature_layers(30)
    (2, 15, 27)
    >>> default_feature_layers(2)
    (0, 1)
    """
    return tuple(sorted({max(min(2, num_layers - 2), 0), num_layers // 2, max(num_layers - 3, 0)}))

"""EAGLE-3: one decoder layer over (embedding of a token, feature of the position before it), run once per depth.

Li et al., "EAGLE-3: Scaling up Inference Acceleration of Large Language Models via Training-Time Test"
(arXiv 2503.01840). Parameter names are those of the checkpoints that SGLang and vLLM load.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from aurora_rl.models.parts import (
    TargetParts,
    check_captured,
    check_heads_stated,
    check_layers_rise,
    copy_layer,
    default_feature_layers,
    layer_config,
    refuse_own_attention,
    settle_attention,
    targets_entries,
    written_config,
)
from aurora_rl.policies.drafter import Checkpoint
from aurora_rl.policies.formats.vllm import LAYER_IDS, from_vllm, to_vllm
from aurora_rl.policies.recurrent import DraftLayer, RecurrentDrafter
from aurora_rl.policies.registry import register_drafter


class Eagle3Layer(DraftLayer):
    """Attention reads [embedding, feature], each normalised; the residual stream is the feature's."""

    input_layernorm: nn.RMSNorm
    hidden_norm: nn.RMSNorm

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config, input_size=2 * config.hidden_size, norms=("input_layernorm", "hidden_norm"))

    def read(self, embedding: Tensor, hidden: Tensor) -> Tensor:
        """What attention reads, ``[b, T, 2H]``."""
        return torch.cat([self.input_layernorm(embedding), self.hidden_norm(hidden)], dim=-1)


@register_drafter("eagle3")
class Eagle3Drafter(RecurrentDrafter):
    """EAGLE-3 with its own KV cache at serving and a reduced draft vocabulary.

    Args:
        config: Llama-style configuration of the layer.
        embedding: ``[V, H]``, the target's, shared and frozen.
        draft_vocab: ``[Vd]`` int64, target ids of the draft head's rows.
        feature_layers: the target's layer ids, low to deep.
        fc_norm: whether each layer's feature is normalised before they are joined (EAGLE-3.1).
        norm_output: whether the next depth reads the state behind the final norm, not before it (EAGLE-3.1).

    Example:
        >>> from aurora_rl.policies import TreeShape
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16))
        >>> drafter.allocate(num_slots=1, max_length=8)
        >>> slot, pair = torch.tensor([0]), torch.zeros(1, 1, parts.config.hidden_size * len(drafter.feature_layers))
        >>> drafter.extend(slot, torch.tensor([[1, 3]]), pair, torch.tensor([1]))
        >>> drafter.propose(slot, TreeShape(depth=2)).tokens.shape
        torch.Size([1, 2])
    """

    formats: ClassVar[tuple[str, ...]] = ("sglang", "vllm", "hf")
    sglang_algorithm: ClassVar[str | None] = "EAGLE3"

    def __init__(
        self,
        config: LlamaConfig,
        *,
        embedding: Tensor,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...],
        fc_norm: bool = False,
        norm_output: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.feature_layers, self.vocab_size = config, feature_layers, config.vocab_size
        self.norm_output = norm_output
        self.options = {"fc_norm": fc_norm, "norm_output": norm_output}
        self.fc = nn.Linear(len(feature_layers) * config.hidden_size, config.hidden_size, bias=False)
        norms = (nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps) for _ in feature_layers)
        self.fc_norm = nn.ModuleList(norms) if fc_norm else None
        self.midlayer = Eagle3Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, len(draft_vocab), bias=False)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)

    @classmethod
    def from_target(
        cls,
        parts: TargetParts,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...] | None = None,
        fc_norm: bool = False,
        norm_output: bool = False,
        attention: str = "target",
    ) -> Self:
        """A day-0 drafter in float32 whose weights start from the target's last layer, final norm and head.

        ``fc`` passes the deepest feature on; queries, keys and values read the feature as the last layer read its
        input. Pieces that the target does not have in this form start
        at random; where they are of its attention or its MLP, that adds nothing until it has learned.

        The option ``attention`` is for :meth:`read`: "own" takes a checkpoint whose heads or rotary settings are not
        the target's.

        Raises:
            ValueError: ``attention`` is another than "target".
        """
        refuse_own_attention(attention)
        drafter = cls(
            layer_config(parts),
            embedding=parts.embedding.float(),
            draft_vocab=draft_vocab,
            feature_layers=feature_layers or default_feature_layers(parts.config.num_hidden_layers),
            fc_norm=fc_norm,
            norm_output=norm_output,
        )
        drafter._start_from(parts)
        return drafter

    @torch.no_grad()
    def _start_from(self, parts: TargetParts) -> None:
        size = self.config.hidden_size
        nn.init.normal_(self.fc.weight, std=0.02 * size**-0.5)
        self.fc.weight[:, -size:] += torch.eye(size)
        self.lm_head.weight.copy_(parts.head.rows(self.draft_vocab))
        if parts.norm is not None:
            self.norm.weight.copy_(parts.norm)
        copy_layer(self.midlayer, parts.last_layer)
        if "input_layernorm.weight" in parts.last_layer:
            self.midlayer.hidden_norm.weight.copy_(parts.last_layer["input_layernorm.weight"])

    @property
    def _layer(self) -> DraftLayer:
        return self.midlayer

    def _fuse(self, features: Tensor) -> Tensor:
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def _enter(self, embedding: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        return self.midlayer.read(embedding, carried), carried

    def _carried(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) if self.norm_output else hidden

    def _read_by_head(self, carried: Tensor) -> Tensor:
        return carried if self.norm_output else self.norm(carried)

    def _head(self, states: Tensor) -> Tensor:
        return self.lm_head(states)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def write(self, layout: str) -> Checkpoint:
        """See :meth:`Drafter.write`.

        "sglang" is what ``LlamaForCausalLMEagle3`` loads: ``d2t[i] = target id − i`` are offsets, ``t2d`` marks the
        target tokens that have a row, and the embedding is the target's and left out. SGLang names a captured state by
        the layer that it leaves (it adds 1 to each id and captures what enters that layer), this library by the layer
        that it enters: the ids in the file are one less than ``feature_layers``. "vllm" adds them as vLLM reads them
        (``vllm_format``). "hf" is what the authors of EAGLE-3 publish, which does not say its layers.

        Raises:
            ValueError: the layout cannot say what this drafter is.
        """
        if layout != "hf":
            check_captured(self.feature_layers, self.config.num_target_layers)
        known = torch.zeros(self.vocab_size, dtype=torch.bool)
        known[self.draft_vocab.cpu()] = True
        config: dict[str, Any] = {
            **written_config(self.config, self.fc.weight.dtype),
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": len(self.draft_vocab),
            "eagle_config": {LAYER_IDS: [layer - 1 for layer in self.feature_layers]},
            **{name: True for name, on in self.options.items() if on},
        }
        tensors = {**self.published(), "t2d": known}
        if layout == "vllm":
            return Checkpoint(*to_vllm(tensors, config))
        if layout == "hf":
            theirs = default_feature_layers(self.config.num_target_layers)
            if self.feature_layers != theirs:
                raise ValueError(f"the drafter reads layers {self.feature_layers}, and files in 'hf' are of {theirs}")
            del config["eagle_config"]
        return Checkpoint(tensors, config)

    @classmethod
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        """See :meth:`Drafter.recognizes`; the authors' own files name Llama, and a draft vocabulary."""
        name = (config.get("architectures") or [""])[0]
        return "Eagle3" in name or (name == "LlamaForCausalLM" and "draft_vocab_size" in config)

    @classmethod
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, layout: str, **options: Any) -> Self:
        """See :meth:`Drafter.read`. Embeddings in the file are passed over: the target's are shared.

        Raises:
            ValueError: names the first entry or tensor that does not fit the target or the class.
        """
        if layout == "vllm" or LAYER_IDS in checkpoint.config:  # of engines, vLLM alone looks for them at the top level
            checkpoint = Checkpoint(*from_vllm(*checkpoint))
        config = checkpoint.config
        tensors = {_our_name(name): tensor for name, tensor in checkpoint.tensors.items()}
        known = tensors.pop("t2d", None)
        tensors.pop("embed_tokens.weight", None)
        for entry in _UNSUPPORTED:
            if config.get(entry) or (config.get("eagle_config") or {}).get(entry):
                raise ValueError(f"config.json: {entry} is set, which this drafter has no form for")
        check_heads_stated(config)
        own = LlamaConfig.from_dict({**config, **targets_entries(parts)})
        if own.num_hidden_layers != 1:
            raise ValueError(f"config.json: num_hidden_layers is {own.num_hidden_layers}, this drafter has one layer")
        settle_attention(own, config, parts, options.get("attention", "target"))
        check_layers_rise(tuple((config.get("eagle_config") or {}).get(LAYER_IDS) or ()))
        rows = config.get("draft_vocab_size") or own.vocab_size
        if "d2t" not in tensors and rows == own.vocab_size:
            tensors["d2t"] = torch.zeros(rows, dtype=torch.int64)  # every token has a row
        if "d2t" not in tensors:
            raise ValueError(f"tensor 'd2t' is missing, and draft_vocab_size is {rows} of {own.vocab_size} tokens")
        layers = (config.get("eagle_config") or {}).get(LAYER_IDS)
        drafter = cls(
            own,
            embedding=parts.embedding.float(),
            draft_vocab=torch.arange(len(tensors["d2t"])),
            feature_layers=(
                tuple(layer + 1 for layer in layers)
                if layers
                else default_feature_layers(parts.config.num_hidden_layers)
            ),
            fc_norm=bool(config.get("fc_norm") or config.get("use_aux_norm")),
            norm_output=bool(config.get("norm_output")),
        )
        drafter.install(tensors)
        if known is not None and not torch.equal(known.nonzero().flatten(), drafter.draft_vocab):
            raise ValueError("tensors 't2d' and 'd2t' name different draft vocabularies")
        return drafter


# Settings of other EAGLE-3 drafters that change what is computed.
_UNSUPPORTED = ("norm_before_fc", "norm_before_residual", "bias", "attention_bias", "mlp_bias")
_OTHER_NAMES = {
    "model.": "",
    "layers.0.": "midlayer.",
    "aux_norm_low": "fc_norm.0",
    "aux_norm_mid": "fc_norm.1",
    "aux_norm_high": "fc_norm.2",
    "draft_id_to_target_id": "d2t",
}


def _our_name(name: str) -> str:
    """A tensor's name here, of those that EAGLE-3 checkpoints use."""
    for other, ours in _OTHER_NAMES.items():
        if name.startswith(other):
            name = ours + name.removeprefix(other)
    return name

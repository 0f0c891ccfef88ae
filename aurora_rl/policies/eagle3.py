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
from typing_extensions import override

from aurora_rl.models.parts import TargetParts, copy_layer, default_feature_layers, layer_config
from aurora_rl.policies.drafter import Checkpoint
from aurora_rl.policies.formats.checks import refuse_own_attention
from aurora_rl.policies.formats.llama_eagle import read_eagle3, write_eagle3
from aurora_rl.policies.recurrent import DraftLayer, RecurrentDrafter
from aurora_rl.policies.registry import register_drafter


@register_drafter("eagle3")
class Eagle3Drafter(RecurrentDrafter):
    """EAGLE-3 with its own KV cache at serving and a reduced draft vocabulary.

    Args:
        config: Llama-style configuration of the layer.
        embedding: The target's embedding, shared and frozen, ``[V, H]``.
        draft_vocab: Target ids of the draft head's rows, ``[Vd]`` int64.
        feature_layers: Layer ids of the target, low to deep.
        fc_norm: Whether each layer's feature is normalised before they are joined (EAGLE-3.1).
        norm_output: Whether the next depth reads the state after the final norm, not before it (EAGLE-3.1).

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
    vllm_method: ClassVar[str | None] = "eagle3"

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
        self.midlayer = DraftLayer(config, input_size=2 * config.hidden_size, norms=("input_layernorm", "hidden_norm"))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, len(draft_vocab), bias=False)
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)

    @classmethod
    @override
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
        """Start a day-0 drafter in float32, its weights from the target's last layer, final norm and head.

        ``fc`` passes the deepest feature on; queries, keys and values read the feature as the last layer read its
        input. Pieces that the target does not have in this form start at random; an attention or MLP that lacks some
        adds nothing until it has learned. The option ``attention`` is for :meth:`read`: "own" takes a checkpoint whose
        heads or rotary settings are not the target's.

        Raises:
            ValueError: ``attention`` is not "target".
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

    @property
    @override
    def vocab_tables(self) -> tuple[Tensor, ...]:
        return (self.lm_head.weight,)

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
    @override
    def _layer(self) -> DraftLayer:
        return self.midlayer

    @override
    def _fuse(self, features: Tensor) -> Tensor:
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    @override
    def _enter(self, embedding: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        # Attention reads embedding and feature, each normalised; the residual stream is the feature's.
        normed = (self.midlayer.input_layernorm(embedding), self.midlayer.hidden_norm(carried))
        return torch.cat(normed, dim=-1), carried

    @override
    def _carried(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden) if self.norm_output else hidden

    @override
    def _read_by_head(self, carried: Tensor) -> Tensor:
        return carried if self.norm_output else self.norm(carried)

    @property
    @override
    def _head_weight(self) -> Tensor:
        return self.lm_head.weight

    @override
    def _head(self, states: Tensor) -> Tensor:
        return self.lm_head(states)  # serving may have replaced the module

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def write(self, format: str) -> Checkpoint:
        return write_eagle3(self, format)

    @classmethod
    @override
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        # The authors' own files name Llama and a draft vocabulary.
        name = (config.get("architectures") or [""])[0]
        return "Eagle3" in name or (name == "LlamaForCausalLM" and "draft_vocab_size" in config)

    @classmethod
    @override
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, format: str, **options: Any) -> Self:
        arguments, tensors = read_eagle3(checkpoint, parts, format, options.get("attention", "target"))
        drafter = cls(**arguments)
        drafter.install(tensors)
        return drafter

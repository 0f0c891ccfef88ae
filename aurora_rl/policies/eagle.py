"""EAGLE and EAGLE-2: one decoder layer that predicts the next feature, which the target's own head reads.

Li et al., "EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty" (arXiv 2401.15077); EAGLE-2 (arXiv
2406.16858) is the same model, and its trees follow the drafter's probabilities, as ``policies.tree_search`` has it.
Parameter names are those of the checkpoints that SGLang loads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from typing_extensions import override

from aurora_rl.models.parts import TargetParts, copy_layer, layer_config
from aurora_rl.policies.drafter import Checkpoint
from aurora_rl.policies.formats.checks import refuse_own_attention
from aurora_rl.policies.formats.llama_eagle import read_eagle, write_eagle
from aurora_rl.policies.recurrent import DraftLayer, RecurrentDrafter
from aurora_rl.policies.registry import OWN_NAME, register_drafter

# Size of the embedding's image by day-0 `fc` relative to the feature's, by root mean squares. On SmolLM2 after 36
# requests it gives 1.19 tokens a round, against 1.13 without, and costs nothing at day 0.
_TOKEN_SHARE = 0.5


@register_drafter("eagle")
class EagleDrafter(RecurrentDrafter):
    """EAGLE with its own KV cache at serving and, where wanted, a reduced draft vocabulary (FR-Spec).

    The one feature is layer id ``num_hidden_layers``, the input of the target's output head. The layer's output
    predicts the next feature: it is carried to the next depth, and the target's head reads it as it is. The head is
    frozen, so ``ImitationLoss(regression=...)`` is the authors' loss, and a swap moves one layer and ``fc``.

    Args:
        config: Llama-style configuration of the layer.
        embedding: The target's embedding, shared and frozen, ``[V, H]``.
        head: Rows of the target's head for the draft vocabulary, frozen, ``[Vd, H]``.
        draft_vocab: Target ids of these rows, ``[Vd]`` int64.
        feature_layers: Layer id of the one feature.

    Raises:
        ValueError: ``feature_layers`` is no single id, or ``head`` has other rows than ``draft_vocab``.

    Example:
        >>> from aurora_rl.policies import TreeShape
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = EagleDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> drafter.feature_layers
        (3,)
        >>> drafter.allocate(num_slots=1, max_length=8)
        >>> slot = torch.tensor([0])
        >>> drafter.extend(slot, torch.tensor([[1, 3]]), torch.zeros(1, 1, 16), torch.tensor([1]))
        >>> drafter.propose(slot, TreeShape(depth=2)).tokens.shape
        torch.Size([1, 2])
    """

    formats: ClassVar[tuple[str, ...]] = ("sglang", "hf")
    sglang_algorithm: ClassVar[str | None] = "EAGLE"
    head: Tensor

    def __init__(
        self,
        config: LlamaConfig,
        *,
        embedding: Tensor,
        head: Tensor,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...],
    ) -> None:
        if len(feature_layers) != 1 or len(head) != len(draft_vocab):
            raise ValueError(
                f"EAGLE reads one feature layer and has a row of the target's head for each token that it drafts, got "
                f"layers {feature_layers} and {len(head)} rows for {len(draft_vocab)} tokens"
            )
        super().__init__()
        self.config, self.feature_layers, self.vocab_size = config, tuple(feature_layers), config.vocab_size
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        # A list to type checkers, which cannot know what a ModuleList holds.
        self.layers = cast(list[DraftLayer], nn.ModuleList([DraftLayer(config, input_size=config.hidden_size)]))
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)

    @classmethod
    @override
    def from_target(
        cls,
        parts: TargetParts,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...] | None = None,
        attention: str = "target",
    ) -> Self:
        """Start a day-0 drafter in float32 that predicts the feature that it reads.

        ``fc`` passes the feature on and adds a random image of the embedding, half as large. Projections into attention
        and MLP are the last layer's, with the norms between them and a feature folded in. Those out of them are zero.
        The option ``attention`` is for :meth:`read`, as that of EAGLE-3.

        Raises:
            ValueError: ``feature_layers`` is not the input of the target's head, or ``attention`` is not "target".
        """
        refuse_own_attention(attention)
        last = (parts.config.num_hidden_layers,)
        if feature_layers not in (None, last):
            raise ValueError(f"EAGLE reads what the target's head reads, feature_layers={last}, got {feature_layers}")
        drafter = cls(
            layer_config(parts),
            embedding=parts.embedding.float(),
            head=parts.head.rows(draft_vocab).float(),
            draft_vocab=draft_vocab,
            feature_layers=last,
        )
        drafter._start_from(parts)
        return drafter

    @torch.no_grad()
    def _start_from(self, parts: TargetParts) -> None:
        size, layer, last = self.config.hidden_size, self._layer, parts.last_layer
        feature, embedding = (
            1.0 if weight is None else float(weight.float().square().mean().sqrt())
            for weight in (parts.norm, parts.embedding)
        )
        nn.init.normal_(self.fc.weight[:, :size], std=_TOKEN_SHARE * feature / embedding * size**-0.5)
        nn.init.normal_(self.fc.weight[:, size:], std=0.02 * size**-0.5)
        self.fc.weight[:, size:] += torch.eye(size)
        nn.init.zeros_(self.fc.bias)
        copy_layer(layer, last)
        if parts.norm is not None:
            # Divide out the final norm's weight, then fold in the pre-attention norm's. A feature says nothing where
            # the former is 0.
            final, before = parts.norm.float(), last.get("input_layernorm.weight", torch.ones(size)).float()
            inverse = torch.where(final == 0, 0.0, 1 / final)
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                projection.weight.mul_(before * inverse)
            layer.post_attention_layernorm.weight.mul_(inverse * feature)
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)

    @property
    @override
    def _layer(self) -> DraftLayer:
        return self.layers[0]

    @override
    def _fuse(self, features: Tensor) -> Tensor:
        return features

    @override
    def _enter(self, embedding: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        # The layer has no norm before its attention, which reads the residual stream itself.
        fused = self.fc(torch.cat([embedding, carried], dim=-1))
        return fused, fused

    @property
    @override
    def _head_weight(self) -> Tensor:
        return self.head

    # ---- weights ----------------------------------------------------------------------------------------------------

    @override
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        # The draft vocabulary stays: of the target's head only its rows are here.
        install = super().stage(weights)
        if not torch.equal(weights["d2t"].to(self.draft_vocab), self.published()["d2t"]):
            raise ValueError(
                f"tensor 'd2t' is not this drafter's draft vocabulary of {len(self.draft_vocab)} tokens, whose rows of "
                "the target's head it holds; load weights that were trained with the same vocabulary"
            )
        return install

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def write(self, format: str) -> Checkpoint:
        return write_eagle(self, format)

    @classmethod
    @override
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        # The authors' own files name Llama, of one layer.
        name = (config.get("architectures") or [""])[0]
        alone = config.get("num_hidden_layers") == 1 and "draft_vocab_size" not in config and OWN_NAME not in config
        return name == "LlamaForCausalLMEagle" or (name == "LlamaForCausalLM" and alone)

    @classmethod
    @override
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, format: str, **options: Any) -> Self:
        arguments, tensors = read_eagle(checkpoint, parts, options.get("attention", "target"))
        drafter = cls(**arguments)
        drafter.install(tensors)
        return drafter

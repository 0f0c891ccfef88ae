"""Medusa: one head per depth, all reading the feature before the root, in one pass and without a cache.

Cai et al., "Medusa: Simple LLM Inference Acceleration Framework with Multiple Decoding Heads" (arXiv 2401.10774).
Parameter names are those of vLLM's ``MedusaModel``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn
from typing_extensions import override

from aurora_kernels.rows import log_softmax
from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.drafter import Checkpoint, Drafter, Proposal, Unroll
from aurora_rl.policies.formats.vllm import from_vllm, to_vllm
from aurora_rl.policies.head_logits import HeadLogits
from aurora_rl.policies.registry import register_drafter
from aurora_rl.policies.tree_search import grow
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.tree_index import TreeIndex, completion_columns


class MedusaBlock(nn.Module):
    """Residual blocks of one head: ``h + silu(linear(h))``, the identity where the linear layers are zero."""

    def __init__(self, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(num_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """Map ``[..., H]`` to ``[..., H]``."""
        for layer in self.layers:
            hidden = hidden + F.silu(layer(hidden))
        return hidden


@register_drafter("medusa")
class MedusaDrafter(Drafter):
    """Medusa heads over a reduced draft vocabulary.

    The one feature is layer id ``num_hidden_layers``, the input of the target's output head. Head ``d`` drafts the
    nodes of depth ``d`` from the feature just before the root, and reads neither the root's token nor the path. All
    nodes of a depth share one distribution, so a tree is a Cartesian product of top tokens.

    The heads of one that starts here have blocks of their own and share one vocabulary matrix, as vLLM's
    ``original_lm_head`` has it: reading a matrix for each was most of what drafting took on a CPU.

    Args:
        hidden_size: Hidden size ``H`` of the target.
        vocab_size: Size of the target's vocabulary.
        draft_vocab: Target ids of the heads' rows, ``[Vd]`` int64.
        feature_layers: Layer id of the one feature.
        num_heads: Number of heads, which is the largest depth.
        num_layers: Residual blocks of each head.
        shared_head: Whether all heads share one vocabulary matrix.

    Raises:
        ValueError: ``feature_layers`` is no single id, or there are no heads.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> drafter.feature_layers
        (3,)
        >>> drafter.allocate(num_slots=1, max_length=8)
        >>> slot = torch.tensor([0])
        >>> drafter.extend(slot, torch.tensor([[1, 3]]), torch.zeros(1, 1, 16), torch.tensor([1]))
        >>> drafter.propose(slot, TreeShape(depth=2, width=2)).parents
        tensor([[-1, -1,  0,  0,  1,  1]])
    """

    formats: ClassVar[tuple[str, ...]] = ("aurora_rl", "vllm")
    vllm_method: ClassVar[str | None] = "medusa"

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...],
        num_heads: int = 4,
        num_layers: int = 1,
        shared_head: bool = True,
    ) -> None:
        if len(feature_layers) != 1 or num_heads < 1:
            found = f"layers {feature_layers} and {num_heads} heads"
            raise ValueError(f"Medusa reads one feature layer and has at least one head, got {found}")
        if num_layers < 0:
            raise ValueError(f"num_layers must not be negative, got {num_layers}; 0 is a head without blocks")
        super().__init__()
        self.feature_layers, self.vocab_size = tuple(feature_layers), vocab_size
        self.blocks = nn.ModuleList(MedusaBlock(hidden_size, num_layers) for _ in range(num_heads))
        self.max_depth = self.num_heads = num_heads
        self.unroll_depth = num_heads  # a head learns from its own depth alone
        heads = (nn.Linear(hidden_size, len(draft_vocab), bias=False) for _ in range(1 if shared_head else num_heads))
        self.lm_heads = nn.ModuleList(heads)
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)

    @classmethod
    @override
    def from_target(
        cls,
        parts: TargetParts,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...] | None = None,
        num_heads: int = 4,
        num_layers: int = 1,
        shared_head: bool = True,
    ) -> Self:
        """Start a day-0 drafter in float32, every head the target's own: its rows, after residual blocks at zero.

        Raises:
            ValueError: ``feature_layers`` is not the input of the target's head.
        """
        config = parts.config
        last = (config.num_hidden_layers,)
        if feature_layers not in (None, last):
            raise ValueError(
                f"Medusa reads what the target's head reads, feature_layers={last}, got {feature_layers}; was the "
                "drafter made for another target?"
            )
        drafter = cls(
            config.hidden_size,
            config.vocab_size,
            draft_vocab=draft_vocab,
            feature_layers=last,
            num_heads=num_heads,
            num_layers=num_layers,
            shared_head=shared_head,
        )
        drafter.options = {"num_heads": num_heads, "num_layers": num_layers, "shared_head": shared_head}
        with torch.no_grad():
            for parameter in drafter.blocks.parameters():
                parameter.zero_()
            for parameter in drafter.lm_heads.parameters():
                parameter.copy_(parts.head.rows(draft_vocab))
        return drafter

    @property
    @override
    def vocab_tables(self) -> tuple[Tensor, ...]:
        return tuple(self.lm_heads.parameters())

    # ---- serving ----------------------------------------------------------------------------------------------------

    @override
    def allocate(self, num_slots: int, max_length: int) -> None:
        weight = next(self.lm_heads.parameters())
        self._state = weight.new_zeros(num_slots, weight.shape[1])
        self.cached = torch.zeros(num_slots, dtype=torch.int64)

    @torch.inference_mode()
    @override
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        last = features[torch.arange(len(slots), device=features.device), (num_new - 1).to(features.device)]
        self._state[slots.to(self._state.device)] = last.to(self._state.dtype)
        self.cached[slots] += num_new

    @override
    def cache_rows(self, slot: int) -> list[Tensor]:
        return []  # it reads the last pair alone

    @torch.inference_mode()
    @override
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        features, depths = self._state[slots.to(self._state.device), None], min(shape.depth, self.num_heads)
        by_depth = self._log_probs(features, max(depths, 1))
        search = grow(self.draft_vocab, shape, generator)
        search.add(by_depth[0])
        for depth in range(1, depths):
            tokens, _ = search.frontier()
            search.add(by_depth[depth].expand(-1, tokens.shape[1], -1))
        return search.proposal()

    def _states(self, head: int, features: Tensor) -> Tensor:
        """Return the input ``[..., H]`` of head ``head`` (from 0) at features ``[..., H]``."""
        return self.blocks[head](features.to(next(self.lm_heads.parameters()).dtype))

    def _log_probs(self, features: Tensor, depths: int) -> list[Tensor]:
        """Return the distribution of each depth, ``[b, 1, Vd]``, at features ``[b, 1, H]``."""
        states = [self._states(head, features) for head in range(depths)]
        if len(self.lm_heads) == 1:  # one product: the matrix is read once
            return list(log_softmax(self.lm_heads[0](torch.cat(states, 1))).split(1, dim=1))
        return [log_softmax(self.lm_heads[head](state)) for head, state in enumerate(states)]

    def _weights(self) -> list[Tensor]:
        """Return the vocabulary matrix of each head, or the one that they share."""
        return [head.get_parameter("weight") for head in self.lm_heads]

    # ---- training ---------------------------------------------------------------------------------------------------

    @override
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        request, column = completion_columns(batch)
        pair = batch["sequence", "prompt_length"][request] - 2 + column  # the pair that predicts the token at step 0
        first, features = _first_pair(batch)[request], batch["sequence", "features"]
        depths = range(min(steps, self.num_heads))
        states = [self._states(step, features[first + (pair - step).clamp(min=0)]) for step in depths]
        valid = torch.stack([(column >= step) & (pair >= step) for step in depths])
        weights = self._weights()
        return Unroll([HeadLogits(s, weights[step % len(weights)]) for step, s in enumerate(states)], valid, states)

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        # A context predicts by its root and depth only.
        request, root, depth = trees.request[wanted], trees.root[wanted].clamp(min=0), trees.depth[wanted]
        features = batch["sequence", "features"][_first_pair(batch)[request] + root]
        weights = self._weights()
        states = features.new_zeros(len(depth), weights[0].shape[1], dtype=weights[0].dtype)
        for head in range(self.num_heads):
            here = (depth == head).nonzero()[:, 0]
            states = states.index_copy(0, here, self._states(head, features[here]).to(states.dtype))
        if len(weights) == 1:
            return HeadLogits(states, weights[0])
        return HeadLogits(states, weights, depth.clamp(max=self.num_heads - 1))  # deeper states are zero

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def write(self, format: str) -> Checkpoint:
        checkpoint = super().write("aurora_rl")
        if format != "vllm":
            return checkpoint
        # A subclass's heads are laid out as these are.
        config = {**checkpoint.config, "architectures": [MedusaDrafter.__name__]}
        return Checkpoint(*to_vllm(checkpoint.tensors, config))

    @classmethod
    @override
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        return (config.get("architectures") or [""])[0] in (cls.__name__, "MedusaModel")

    @classmethod
    @override
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, format: str, **options: Any) -> Self:
        if format == "vllm" or checkpoint.config.get("architectures") == ["MedusaModel"]:
            # Heads that other programs trained read the input of the target's output head.
            tensors, config = from_vllm(*checkpoint)
            checkpoint = Checkpoint(tensors, {"feature_layers": [parts.config.num_hidden_layers], **config})
        said = checkpoint.config["options"]
        if "lm_heads.1.weight" in checkpoint.tensors and "shared_head" not in said:  # of an earlier release
            config = {**checkpoint.config, "options": {**said, "shared_head": False}}
            checkpoint = Checkpoint(checkpoint.tensors, config)
        return super().read(checkpoint, parts, "aurora_rl", **options)


def _first_pair(batch: TensorDictBase) -> Tensor:
    """Return the row of each request's pair 0 in the packed features, ``[n]``; a request has a row less than tokens."""
    start = batch["sequence", "offset"][:-1]
    return start - torch.arange(len(start), device=start.device)

"""DFlash: a few decoder layers fill a block of masks after the root in one pass, over the target's states as context.

Chen et al., "DFlash: Block Diffusion for Flash Speculative Decoding" (arXiv 2602.06036). Parameter names are those of
the checkpoints that SGLang, vLLM and the authors' own code load.

Legend: ``r`` requests or slots, ``A`` anchors of each, ``W`` positions of a block, ``S`` context positions, ``g`` key
heads, ``d`` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from typing_extensions import override

from aurora_kernels.rows import log_softmax
from aurora_rl.models.kv_cache import rows_of
from aurora_rl.models.parts import TargetParts, copy_layer, layer_config, target_entries
from aurora_rl.policies.attention import KeysValues
from aurora_rl.policies.block_layer import BlockLayer, Rotation
from aurora_rl.policies.drafter import Checkpoint, Drafter, Proposal, Unroll
from aurora_rl.policies.formats.dflash import read_dflash, write_dflash
from aurora_rl.policies.head_logits import HeadLogits
from aurora_rl.policies.registry import register_drafter
from aurora_rl.policies.tree_search import grow
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.trajectories import pad_rows
from aurora_rl.tree_index import TreeIndex, completion_columns


@register_drafter("dflash")
class DFlashDrafter(Drafter):
    """DFlash with the context's keys and values cached at serving, and a reduced draft vocabulary.

    With the root at position ``n``, the block holds the root's token and masks at ``n + 1 .. n + W - 1``. Each mask
    drafts the token of its own position. The context is the target's states at ``0 .. n - 1``, joined by ``fc`` and
    ``hidden_norm`` and projected by every layer. All nodes of a depth share one distribution, so a tree is a Cartesian
    product of top tokens. Embedding and head are the target's and frozen.

    Args:
        config: Qwen3-style configuration of the layers; ``num_hidden_layers`` of them.
        embedding: The target's embedding, ``[V, H]``.
        head: The target's head, ``[V, H]``; None if it is the embedding.
        draft_vocab: Target ids of the head's rows that are used, ``[Vd]`` int64.
        feature_layers: Layer ids of the target, low to deep.
        num_target_layers: Number of decoder layers of the target, which checkpoints name.
        block_size: Positions ``W`` of a block, the root's included.
        mask_token_id: Token whose embedding stands for what is to be drafted.

    Raises:
        ValueError: A block has fewer than two positions, there are no layers or features, or the mask is outside the
            vocabulary.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = DFlashDrafter.from_target(parts, draft_vocab=torch.arange(16), block_size=4)
        >>> drafter.feature_layers, drafter.max_depth
        ((1, 2), 3)
        >>> drafter.allocate(num_slots=1, max_length=8)
        >>> slot, pair = torch.tensor([0]), torch.zeros(1, 1, parts.config.hidden_size * len(drafter.feature_layers))
        >>> drafter.extend(slot, torch.tensor([[1, 3]]), pair, torch.tensor([1]))
        >>> drafter.propose(slot, TreeShape(depth=2)).tokens.shape
        torch.Size([1, 2])
    """

    formats: ClassVar[tuple[str, ...]] = ("hf", "sglang")
    sglang_algorithm: ClassVar[str | None] = "DFLASH"
    embedding: Tensor
    target_head: Tensor | None
    head: Tensor

    def __init__(
        self,
        config: Qwen3Config,
        *,
        embedding: Tensor,
        head: Tensor | None,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...],
        num_target_layers: int,
        block_size: int,
        mask_token_id: int,
    ) -> None:
        if block_size < 2 or config.num_hidden_layers < 1 or not feature_layers:
            raise ValueError(
                f"DFlash has a block of at least 2 positions, a layer and a feature, got block_size={block_size}, "
                f"{config.num_hidden_layers} layers and features of layers {feature_layers}"
            )
        if not 0 <= mask_token_id < len(embedding):
            raise ValueError(f"mask_token_id must lie in 0..{len(embedding) - 1}, got {mask_token_id}")
        super().__init__()
        self.config, self.feature_layers, self.vocab_size = config, tuple(feature_layers), config.vocab_size
        self.num_target_layers, self.block_size, self.mask_token_id = num_target_layers, block_size, mask_token_id
        self.max_depth = block_size - 1
        layers = config.num_hidden_layers
        self.options = {"num_layers": layers, "block_size": block_size, "mask_token_id": mask_token_id}
        self.fc = nn.Linear(len(feature_layers) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # A list to type checkers, which cannot know what a ModuleList holds.
        self.layers = cast(list[BlockLayer], nn.ModuleList(BlockLayer(config) for _ in range(layers)))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self._rotary = [Qwen3RotaryEmbedding(config)]  # in a list: no submodule, so no buffers in checkpoints
        self.register_buffer("embedding", embedding, persistent=False)
        self.register_buffer("target_head", head, persistent=False)
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)
        self.register_buffer("head", self._head_rows(draft_vocab), persistent=False)

    @classmethod
    @override
    def from_target(
        cls,
        parts: TargetParts,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...] | None = None,
        num_layers: int = 2,
        block_size: int = 8,
        mask_token_id: int | None = None,
    ) -> Self:
        """Start a day-0 drafter in float32, all layers as the target's last, reading its deepest feature.

        ``feature_layers`` None spreads as many as there are layers, at least three, as DFlash does. With one decoder
        layer (``num_layers``) masks do not see each other's work. A block has ``block_size`` positions, one more than
        the deepest draft. ``mask_token_id`` None takes the last token of the vocabulary, usually padding or rare.
        """
        target = parts.config
        drafter = cls(
            _layers_config(parts, num_layers),
            **_targets(parts),
            draft_vocab=draft_vocab,
            feature_layers=feature_layers or tuple(sorted(set(_spread(target.num_hidden_layers, max(num_layers, 3))))),
            block_size=block_size,
            mask_token_id=target.vocab_size - 1 if mask_token_id is None else mask_token_id,
        )
        drafter._start_from(parts)
        return drafter

    @torch.no_grad()
    def _start_from(self, parts: TargetParts) -> None:
        size, last = self.config.hidden_size, parts.last_layer
        nn.init.normal_(self.fc.weight, std=0.02 * size**-0.5)
        self.fc.weight[:, -size:] += torch.eye(size)
        if parts.norm is not None:
            self.norm.weight.copy_(parts.norm)
        if (read_by := last.get("input_layernorm.weight")) is not None:
            self.hidden_norm.weight.copy_(read_by)
        for layer in self.layers:
            copied, own = copy_layer(layer, last), dict(layer.named_parameters())
            # Norms that the target lacks start at the root mean square of its projection's outputs: exact for
            # uncorrelated inputs, and for SmolLM2 three quarters of the measured value.
            for kind in ("q", "k"):
                norm, projection = f"self_attn.{kind}_norm.weight", f"self_attn.{kind}_proj.weight"
                if norm not in copied and read_by is not None and projection in last:
                    own[norm].fill_((last[projection] * read_by).square().sum(1).mean().sqrt())

    def _head_rows(self, draft_vocab: Tensor) -> Tensor:
        return (self.embedding if self.target_head is None else self.target_head)[draft_vocab]

    def _fuse(self, features: Tensor) -> Tensor:
        """Fuse features ``[..., F]`` of the target into what the layers project to keys and values, ``[..., H]``."""
        return self.hidden_norm(self.fc(features.to(self.fc.weight.dtype)))

    def _rotation(self, positions: Tensor) -> Rotation:
        """Return cosines and sines, each ``[..., d]``, of positions ``[...]``."""
        flat = positions.reshape(1, -1)
        cos, sin = self._rotary[0].to(flat.device)(self.norm.weight.float(), flat)
        return cos[0].unflatten(0, positions.shape), sin[0].unflatten(0, positions.shape)

    def _fill(self, tokens: Tensor, positions: Tensor, context: list[KeysValues], mask: Tensor) -> Tensor:
        """Return what the head reads at each depth, ``[r, A, W - 1, H]``, by one pass over blocks.

        Tokens and positions ``[r, A]`` int64 are those of the roots. ``context`` has each layer's keys and values,
        ``[r, S, g, d]``, and ``mask`` ``[r, A, S]`` bool says which of them an anchor sees.
        """
        block = F.pad(tokens[..., None], (0, self.block_size - 1), value=self.mask_token_id)
        hidden = F.embedding(block, self.embedding).to(self.fc.weight.dtype)
        rotation = self._rotation(positions[..., None] + torch.arange(self.block_size, device=positions.device))
        for layer, seen in zip(self.layers, context, strict=True):
            hidden = layer(hidden, rotation, seen, mask)
        return self.norm(hidden[..., 1:, :])

    # ---- serving ----------------------------------------------------------------------------------------------------

    @override
    def allocate(self, num_slots: int, max_length: int) -> None:
        weight, attention = self.fc.weight, self.layers[0].self_attn
        shape = (num_slots, max_length, attention.num_key_heads, attention.head_dim)
        self._cache = [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.layers]
        self._root = torch.zeros(num_slots, dtype=torch.int64, device=weight.device)
        self.cached = torch.zeros(num_slots, dtype=torch.int64)

    @torch.inference_mode()
    @override
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        device = features.device
        row, column = (torch.arange(features.shape[1]) < num_new[:, None]).nonzero(as_tuple=True)
        position = self.cached[slots][row] + column
        row, column, position, rows = (part.to(device) for part in (row, column, position, slots))
        context, rotation = self._fuse(features[row, column]), self._rotation(position)
        for layer, cache in zip(self.layers, self._cache, strict=True):
            for held, new in zip(cache, layer.self_attn.keys_values(context, rotation), strict=True):
                held[rows[row], position] = new
        self._root[rows] = tokens.gather(1, num_new.to(device)[:, None])[:, 0]
        self.cached[slots] += num_new

    @override
    def cache_rows(self, slot: int) -> list[Tensor]:
        return [cache[slot] for layer in self._cache for cache in layer]

    @torch.inference_mode()
    @override
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        held = self.cached[slots]
        end = int(held.max())
        rows, held = slots.to(self._root.device), held.to(self._root.device)
        at = rows_of(slots, rows.device), slice(end)
        context = [(keys[at], values[at]) for keys, values in self._cache]
        mask = torch.arange(end, device=rows.device) < held[:, None, None]
        states = self._fill(self._root[rows, None], held[:, None], context, mask)
        log_probs = log_softmax(F.linear(states[:, 0, : max(shape.depth, 1)], self.head))
        search = grow(self.draft_vocab, shape, generator)
        search.add(log_probs[:, :1])
        for depth in range(1, log_probs.shape[1]):
            tokens, _ = search.frontier()
            search.add(log_probs[:, depth : depth + 1].expand(-1, tokens.shape[1], -1))
        return search.proposal()

    # ---- training ---------------------------------------------------------------------------------------------------

    def _blocks(self, batch: TensorDictBase, request: Tensor, root: Tensor) -> Tensor:
        """Return the head's inputs ``[a, W - 1, H]`` for blocks that start at anchors in the text of a packed batch.

        ``request`` ``[a]`` int64 is the request of each anchor, rising, and ``root`` ``[a]`` int64 the pair of its
        root; −1 sees no context.
        """
        offset = batch["sequence", "offset"]
        number = torch.arange(len(offset), device=offset.device)
        context = pad_rows(self._fuse(batch["sequence", "features"]), offset - number)
        pairs = torch.arange(context.shape[1], device=offset.device)
        rotation = self._rotation(pairs)
        counts = torch.bincount(request, minlength=len(offset) - 1)
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        tokens = pad_rows(batch["sequence", "tokens"][offset[request] + root + 1], start)
        roots = pad_rows(root, start)
        keys_values = [layer.self_attn.keys_values(context, rotation) for layer in self.layers]
        states = self._fill(tokens, roots + 1, keys_values, pairs <= roots[:, :, None])
        return states[torch.arange(tokens.shape[1], device=offset.device) < counts[:, None]]

    @override
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        request, column = completion_columns(batch)
        place = torch.arange(len(request), device=request.device)
        root = batch["sequence", "prompt_length"][request] - 2 + column  # root of the block that first masks this token
        blocks = self._blocks(batch, request, root)
        states = [blocks[(place - step).clamp(min=0), step] for step in range(min(steps, self.block_size - 1))]
        valid = torch.stack([(column >= step) & (root >= step) for step in range(len(states))])
        return Unroll([HeadLogits(state, self.head) for state in states], valid, states)

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        # A context predicts by its root and depth only: one pass over the blocks of the rounds that are asked for.
        offset = batch["rounds", "offset"]
        number = torch.arange(trees.num_rounds, device=offset.device)
        rounds = torch.cat([number, torch.repeat_interleave(number, offset.diff())])
        asked, block = rounds[wanted].unique(return_inverse=True)
        depth = trees.depth[wanted].clamp(max=self.block_size - 2)
        states = self._blocks(batch, trees.request[asked], trees.root[asked])
        return HeadLogits(states[block, depth], self.head)

    # ---- weights ----------------------------------------------------------------------------------------------------

    @override
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        # Another draft vocabulary takes other rows of the target's head.
        put, before = super().stage(weights), self.draft_vocab
        vocab = weights["d2t"].to(before) + torch.arange(len(before)).to(before)
        head = self.head if torch.equal(vocab, before) else self._head_rows(vocab)

        def install() -> None:
            put()
            self.head = head

        return install

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def write(self, format: str) -> Checkpoint:
        return write_dflash(self, format)

    @classmethod
    @override
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        return config.get("architectures") == ["DFlashDraftModel"]

    @classmethod
    @override
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, format: str, **options: Any) -> Self:
        arguments, tensors = read_dflash(checkpoint, parts, options.get("mask_token_id"))
        usual = _spread(parts.config.num_hidden_layers, arguments["config"].num_hidden_layers)
        drafter = cls(**{**arguments, **_targets(parts), "feature_layers": arguments["feature_layers"] or usual})
        drafter.install(tensors)
        return drafter


def _targets(parts: TargetParts) -> dict[str, Any]:
    """Return the arguments that a drafter shares with its target."""
    head = parts.head.rows()
    return {
        "embedding": parts.embedding.float(),
        "head": None if head.data_ptr() == parts.embedding.data_ptr() else head.float(),
        "num_target_layers": parts.config.num_hidden_layers,
    }


def _layers_config(parts: TargetParts, num_layers: int) -> Qwen3Config:
    """Return the configuration of layers of the target's sizes and rotary settings."""
    layer = layer_config(parts)
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
    return Qwen3Config(
        **{name: getattr(layer, name) for name in (*sizes, "rms_norm_eps", "rope_parameters")},
        num_hidden_layers=num_layers,
        tie_word_embeddings=False,
        **target_entries(parts),
    )


def _spread(num_layers: int, count: int) -> tuple[int, ...]:
    """Return the ids of ``count`` layers that DFlash reads by default, from the second's input to the third last's.

    DFlash has no rule for targets of fewer than four layers; here its ids are moved to between two layers.

    >>> _spread(36, 5), _spread(36, 1), _spread(3, 3)
    ((2, 10, 18, 26, 34), (19,), (2, 1, 1))
    """
    if count == 1:
        left = [num_layers // 2]
    else:
        left = [round(1 + i * (num_layers - 4) / (count - 1)) for i in range(count)]
    return tuple(min(max(layer + 1, 1), max(num_layers - 1, 1)) for layer in left)

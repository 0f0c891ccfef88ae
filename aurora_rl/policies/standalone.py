"""A causal LM as drafter: one with the target's tokenizer, or a few layers that start from the target's own.

Leviathan et al., "Fast Inference from Transformers via Speculative Decoding" (arXiv 2211.17192). It reads tokens only,
no features of the target, and its checkpoints are ordinary Hugging Face folders.

Legend: ``V`` vocabulary, ``Vd`` draft vocabulary, ``H`` hidden size of the drafter, ``b`` slots of a call, ``T`` tokens
of each, ``n`` requests of a batch, ``R`` rounds and ``M`` nodes in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn
from transformers import PreTrainedModel
from typing_extensions import override

from aurora_kernels import TreeMask
from aurora_kernels.rows import log_softmax
from aurora_rl.models.attention import GROUPED_ATTENTION, PassMask, TextAndTrees
from aurora_rl.models.kv_cache import PassPart, SlotCache, uniform_shapes
from aurora_rl.models.parts import TargetParts, copy_layer, layer_config
from aurora_rl.policies.drafter import Checkpoint, Drafter, Proposal, Unroll
from aurora_rl.policies.formats.causal_lm import (
    check_causal_lm,
    layers_of,
    load_causal_lm,
    read_causal_lm,
    write_causal_lm,
)
from aurora_rl.policies.head_logits import HeadLogits
from aurora_rl.policies.registry import register_drafter
from aurora_rl.policies.tree_search import grow
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.trajectories import pad_rows
from aurora_rl.tree_index import TreeIndex, true_chains

# Columns after the longest text. A pass over slots of unequal length pads into them, and trees are written there.
_SLACK = 64


class Branches(NamedTuple):
    """Places from which contexts of recorded trees are read: the text, for a context whose path is that of the text.

    Attributes:
        on_text: Whether each context stands on the text, ``[R + M]`` bool.
        position: Position of each context's token in its request, ``[R + M]`` int64.
        leaves: Position of the last token that each context's path shares with the text, ``[R + M]`` int64.
        nodes: Wanted contexts off the text and those above them, ``[m]`` int64.
        place: Place of each of these among those of its request, ``[R + M]`` int64.
        offset: Start of each request in ``nodes``, ``[n + 1]`` int64.
        ends: One past the place of the last of these in the subtree of each, ``[m]`` int64.
    """

    on_text: Tensor
    position: Tensor
    leaves: Tensor
    nodes: Tensor
    place: Tensor
    offset: Tensor
    ends: Tensor

    @classmethod
    def of(cls, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Branches:
        """Sort the contexts of a packed batch, of which ``wanted`` (``[R + M]`` bool) are asked for."""
        offset, rounds = batch["sequence", "offset"], torch.arange(trees.num_rounds, device=wanted.device)
        above, levels = torch.cat([rounds, trees.parent]), range(int(trees.depth.max()))
        position = trees.root + 1 + trees.depth
        last = offset.diff()[trees.request] - 1
        spelled = batch["sequence", "tokens"][offset[trees.request] + torch.minimum(position, last)]
        same = (position <= last)[len(rounds) :] & (spelled[len(rounds) :] == batch["nodes", "tokens"])
        on_text = torch.cat([torch.ones_like(rounds, dtype=torch.bool), same])
        for _ in levels:
            on_text = on_text & on_text[above]
        leaves, needed = torch.where(on_text, position, 0), wanted & ~on_text
        for _ in levels:
            leaves = torch.where(on_text, position, leaves[above])
            needed[above[needed]] = True
            needed &= ~on_text
        nodes = needed.nonzero().flatten()
        request = trees.request[nodes]
        counts = torch.bincount(request, minlength=len(offset) - 1)
        start = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = torch.full_like(position, -1)
        place[nodes] = torch.arange(len(nodes), device=nodes.device) - start[request]
        among_all = nodes - len(rounds)
        ends = torch.searchsorted(among_all, trees.ends[among_all]) - start[request]
        return cls(on_text, position, leaves, nodes, place, start, ends)


@register_drafter("standalone")
class StandaloneDrafter(Drafter):
    """A causal LM with a KV cache for every slot, run once per depth over the nodes of a tree.

    The embedding is frozen and never published; layers, final norm and the rows of the head for the draft vocabulary
    learn.

    Args:
        lm: Causal LM of any architecture that attends as Llama does; its decoder layers and final norm are used.
        embedding: Embedding of the drafter, ``[V, H]``.
        head: All rows of the drafter's head, ``[V, H]``; checkpoints need those outside the draft vocabulary too.
        draft_vocab: Tokens that it may draft, ``[Vd]`` int64.
        target_width: Hidden size of the target.

    Raises:
        ValueError: The LM computes in a way that the slot cache has no form for.

    Example:
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = StandaloneDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> drafter.allocate(num_slots=1, max_length=8)
        >>> slot, no_features = torch.tensor([0]), torch.zeros(1, 2, 0)
        >>> drafter.extend(slot, torch.tensor([[1, 3, 5]]), no_features, torch.tensor([2]))
        >>> drafter.propose(slot, TreeShape(depth=3)).tokens.shape
        torch.Size([1, 3])
    """

    formats: ClassVar[tuple[str, ...]] = ("hf", "sglang", "vllm")
    sglang_algorithm: ClassVar[str | None] = "STANDALONE"
    target_sizes: ClassVar[tuple[str, ...]] = ("vocab_size",)
    serves_other_targets: ClassVar[bool] = True
    feature_layers = ()

    def __init__(
        self, lm: PreTrainedModel, *, embedding: Tensor, head: Tensor, draft_vocab: Tensor, target_width: int
    ) -> None:
        super().__init__()
        _check_served(lm)
        self.vocab_size, self._target_width = len(head), target_width
        self.config = copy.deepcopy(lm.config)
        self.config.vocab_size, self.config.architectures = len(head), [type(lm).__name__]
        self.options = {"num_layers": self.config.num_hidden_layers}
        # Named as in a causal LM, so that the names of a checkpoint are those of the state dict.
        self.model: Any = lm.get_decoder()
        table = self.model.embed_tokens
        del table.weight
        table.register_buffer("weight", embedding, persistent=False)
        self.lm_head = nn.Linear(head.shape[1], len(draft_vocab), bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(head[draft_vocab])
        self.whole_head = head  # no buffer: it is needed for checkpoints alone, in the target's memory
        self.register_buffer("draft_vocab", draft_vocab.clone(), persistent=False)

    @classmethod
    @override
    def from_target(
        cls,
        parts: TargetParts,
        *,
        draft_vocab: Tensor,
        feature_layers: tuple[int, ...] | None = None,
        model: str | None = None,
        num_layers: int = 2,
    ) -> Self:
        """Start a day-0 drafter in float32 from a causal LM with the target's tokenizer, ``model`` (folder or hub id).

        Without one, it is the target's last layer, final norm and head on the target's embedding, after layers that add
        nothing until they have learned, ``num_layers`` in all. No features are read: ``feature_layers`` must be empty.

        Raises:
            ValueError: The model cannot be loaded or served, or has another vocabulary; or there are no layers, or
                feature layers.
        """
        if feature_layers:
            raise ValueError(f"a standalone drafter reads no features; leave feature_layers={feature_layers} out")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if model is not None:
            lm = load_causal_lm(model)
            check_causal_lm(lm.config, parts, f"the model {model!r}")
            tables = (lm.get_input_embeddings(), lm.get_output_embeddings())
            embedding, head = (table.get_parameter("weight").detach() for table in tables)
        else:
            config = layer_config(parts)
            config.num_hidden_layers = num_layers
            lm, embedding, head = layers_of(config), parts.embedding.float(), parts.head.rows()
            _start_from(lm, parts)
        width = parts.embedding.shape[1]
        drafter = cls(lm, embedding=embedding, head=head, draft_vocab=draft_vocab, target_width=width)
        if model is not None:
            drafter.options = {"model": model, "num_layers": num_layers}
        return drafter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Rotary frequencies stay in float32 in any dtype of the drafter, as in a loaded model. Rounded to bfloat16 they
        # would be off by whole turns far into a text.
        exact = {name: held for name, held in self.model.named_buffers() if name.endswith("inv_freq")}
        super()._apply(fn, recurse)
        for name, held in exact.items():
            owner, _, own_name = name.rpartition(".")
            module = self.model.get_submodule(owner)
            setattr(module, own_name, held.to(getattr(module, own_name).device))
        return self

    # ---- serving ----------------------------------------------------------------------------------------------------

    @override
    def allocate(self, num_slots: int, max_length: int) -> None:
        weight = self.lm_head.weight
        self._longest = max_length
        shapes = uniform_shapes(self.config)
        self._cache = SlotCache(shapes, num_slots, max_length + _SLACK, weight.dtype, weight.device)
        self._state = weight.new_zeros(num_slots, weight.shape[1])
        self.cached = torch.zeros(num_slots, dtype=torch.int64)

    def _read(
        self, slots: Tensor, tokens: Tensor, position: Tensor, columns: Tensor, mask: TreeMask, end: int
    ) -> Tensor:
        """Run one pass over ``tokens`` ``[b, T]`` that reads the columns before ``end``: ``[b, T, H]``."""
        self._cache.aim(PassPart(slots, columns, end))
        return self.model(
            input_ids=tokens,
            position_ids=position,
            attention_mask=PassMask.of(mask, tokens),
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state

    @torch.inference_mode()
    @override
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        # If a slot holds pairs, its first column is read again: a row more here saves `propose` a pass of its own.
        (b, width), device = tokens.shape, tokens.device
        held, row = self.cached[slots].to(device)[:, None], torch.arange(width, device=device)
        end = int((self.cached[slots] + num_new).max()) + 1
        # Padding goes after the text, where the next pass writes; the last column of all is never read.
        columns = (held + row).clamp(max=self._cache.columns - 1)
        hidden = self._read(slots, tokens, held + row, columns, TreeMask(held[:, 0]), end)
        self._state[slots.to(device)] = hidden[torch.arange(b, device=device), num_new.to(device)]
        self.cached[slots] += num_new

    @override
    def cache_rows(self, slot: int) -> list[Tensor]:
        return self._cache.rows(slot)

    @torch.inference_mode()
    @override
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        # Nodes are written after the text, where the next pairs go.
        self._cache.widen(self._longest + shape.depth * shape.width + 1)
        rows = slots.to(self._state.device)
        past = self.cached[slots].to(rows.device)[:, None] + 1
        every = torch.arange(len(rows), device=rows.device)[:, None]
        search = grow(self.draft_vocab, shape, generator)
        search.add(log_softmax(self.lm_head(self._state[rows, None])))
        seen = torch.zeros(len(rows), 1, 0, dtype=torch.bool, device=rows.device)
        for depth in range(1, shape.depth):
            tokens, parent = search.frontier()
            width, used = tokens.shape[1], seen.shape[2]
            # A node sees what its parent saw, and itself.
            itself = torch.eye(width, dtype=torch.bool, device=rows.device).expand(len(rows), -1, -1)
            seen = torch.cat([seen[every, parent], itself], dim=2)
            columns = past + used + torch.arange(width, device=rows.device)
            end = int(self.cached[slots].max()) + 1 + used + width
            position = (past + depth - 1).expand_as(tokens)
            hidden = self._read(slots, tokens, position, columns, TreeMask(past[:, 0], seen), end)
            search.add(log_softmax(self.lm_head(hidden)))
        return search.proposal()

    # ---- training ---------------------------------------------------------------------------------------------------

    @override
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        # A chain of the true tokens is the text itself, and an LM predicts from the text whatever the anchor: one
        # teacher-forced pass, the same rows at every step.
        chains, _, valid = true_chains(batch, steps)
        trees = TreeIndex.of(chains)
        states = self._states(chains, trees, trees.depth == 0)
        logits = HeadLogits(states, self.lm_head.weight)
        return Unroll([logits] * steps, valid, [states] * steps if states.shape[1] == self._target_width else None)

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        return HeadLogits(self._states(batch, trees, wanted), self.lm_head.weight)

    def _states(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        """Return the head's inputs at the wanted contexts, ``[number wanted, H]``."""
        branches = Branches.of(batch, trees, wanted)
        nodes, offset = branches.nodes, branches.offset
        text = pad_rows(batch["sequence", "tokens"], batch["sequence", "offset"])
        drafted = pad_rows(batch["nodes", "tokens"][nodes - trees.num_rounds], offset)
        column, place = (torch.arange(part.shape[1], device=part.device) for part in (text, drafted))
        ends = pad_rows(branches.ends, offset).maximum(place + 1)  # padding sees itself
        tokens = torch.cat([text, drafted], dim=1)
        hidden = self.model(
            input_ids=tokens,
            position_ids=torch.cat([column.expand_as(text), pad_rows(branches.position[nodes], offset)], dim=1),
            attention_mask=PassMask.of(TextAndTrees(pad_rows(branches.leaves[nodes] + 1, offset), ends), tokens),
            use_cache=False,
        ).last_hidden_state
        at = torch.where(branches.on_text, branches.position, text.shape[1] + branches.place)
        return hidden[trees.request[wanted], at[wanted]]

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    @override
    def write(self, format: str) -> Checkpoint:
        return write_causal_lm(self)

    @classmethod
    @override
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        return (config.get("architectures") or [""])[0].endswith("ForCausalLM")  # no other drafter claims these

    @classmethod
    @override
    def read(cls, checkpoint: Checkpoint, parts: TargetParts, format: str, **options: Any) -> Self:
        drafter = cls(**read_causal_lm(checkpoint, parts), target_width=parts.embedding.shape[1])
        if "model" in options:  # the source of its first weights; the folder holds the present ones
            drafter.options = options
        return drafter


@torch.no_grad()
def _start_from(lm: Any, parts: TargetParts) -> None:
    """Copy the target's final norm, and its last layer where weights fit; layers before it pass on what they read."""
    if parts.norm is not None:
        lm.model.norm.weight.copy_(parts.norm)
    *before, last = lm.model.layers
    for layer in before:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    copy_layer(last, parts.last_layer)


@torch.no_grad()
def _check_served(lm: Any) -> None:
    """Raise ValueError unless the LM's layers with our cache and masks, followed by its head, reproduce its logits."""
    name, tokens = type(lm).__name__, torch.arange(4, device=lm.device)[None]
    try:
        decoder = lm.model
        own = lm.eval()(tokens).logits
        lm.set_attn_implementation(GROUPED_ATTENTION)
        cache, slot, served = SlotCache(uniform_shapes(lm.config), 1, 4, lm.dtype, lm.device), torch.tensor([0]), []
        for columns in (tokens[:, :1], tokens[:, 1:]):
            cache.aim(PassPart(slot, columns, int(columns.max()) + 1))
            mask = PassMask.of(TreeMask(columns[:, 0]), columns)
            out = decoder(columns, mask, columns, past_key_values=cache, use_cache=True)
            served.append(F.linear(out.last_hidden_state, lm.lm_head.weight))
        # The first two as text, the others as a path that leaves it.
        two = torch.full((1, 2), 2, device=lm.device)
        out = decoder(tokens, PassMask.of(TextAndTrees(two, two), tokens), tokens, use_cache=False)
        forms = {"serving": torch.cat(served, dim=1), "training": F.linear(out.last_hidden_state, lm.lm_head.weight)}
    except Exception as error:  # a model of other parts, or one that is called in another way
        raise ValueError(f"{name} has no layers that a standalone drafter could serve: {error}") from error
    for face, logits in forms.items():
        if not torch.allclose(logits, own, rtol=0, atol=1e-4 * float(own.abs().max())):
            raise ValueError(
                f"{name} computes something else in {face}'s form, such as logits that are scaled, shifted or "
                "capped, or attention with terms of its own; take another architecture"
            )

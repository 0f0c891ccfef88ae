"""Drafters of one decoder layer that runs once per depth on its own last output: serving and training.

Legend: ``b`` rows, ``T`` positions, ``H`` hidden size, ``F`` features, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from typing_extensions import override

from aurora_kernels.rows import log_softmax
from aurora_rl.models.kv_cache import rows_of
from aurora_rl.policies.adapters import by_request, by_slot
from aurora_rl.policies.attention import KeysValues, TreeAttention
from aurora_rl.policies.by_rows import by_rows
from aurora_rl.policies.drafter import Drafter, Proposal, Unroll
from aurora_rl.policies.head_logits import HeadLogits
from aurora_rl.policies.tree_search import grow
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.trajectories import pad_rows
from aurora_rl.tree_index import TreeIndex

# Attention scores of a training pass that may be kept for the backward pass; more are computed again, by rows.
_SCORES = {"cpu": 2**25, "cuda": 2**27}


class DraftLayer(nn.Module):
    """A Llama decoder layer whose attention may read something else than its residual stream.

    Args:
        config: Llama-style configuration.
        input_size: Width of the attention's input.
        norms: Names of norms ``[H]`` that come before it, for the drafter to apply.
    """

    input_layernorm: nn.RMSNorm
    hidden_norm: nn.RMSNorm

    def __init__(self, config: LlamaConfig, *, input_size: int, norms: Sequence[str] = ()) -> None:
        super().__init__()
        for name in norms:
            self.add_module(name, nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.self_attn = TreeAttention(config, input_size=input_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        sequence: KeysValues,
        mask: Tensor,
        branch: KeysValues | None,
    ) -> Tensor:
        """Map what attention reads, ``x``, and the residual stream, both at ``[b, T]`` positions, to ``[b, T, H]``."""
        hidden = residual + self.self_attn(x, positions, sequence, mask, branch)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class RecurrentDrafter(Drafter):
    """Base of drafters of one layer: a KV cache at serving, trees searched depth by depth, and their training.

    The state that is *carried* at a position, ``[..., H]``, comes from the target's features if the target has been
    there. Otherwise it is the layer's output at the last depth. A subclass defines how it is computed and read.

    Attributes:
        config: Llama-style configuration of the layer.
        embedding: The target's embedding, shared and frozen, ``[V, H]``.
        fc: Linear layer whose dtype and device all computation has.
    """

    config: LlamaConfig
    embedding: Tensor
    fc: nn.Linear
    takes_adapters: ClassVar[bool] = True  # rows of every linear layer but the head are those of slots or requests

    @property
    @abstractmethod
    def _layer(self) -> DraftLayer:
        """The decoder layer."""

    @abstractmethod
    def _fuse(self, features: Tensor) -> Tensor:
        """Turn features ``[..., F]`` of the target, in the drafter's dtype, into the carried state."""

    @abstractmethod
    def _enter(self, embedding: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """Return the attention's input and the residual stream for a token's embedding and the carried state."""

    @property
    @abstractmethod
    def _head_weight(self) -> Tensor:
        """The draft head, ``[Vd, H]``."""

    def _head(self, states: Tensor) -> Tensor:
        """Return the logits ``[..., Vd]`` of the head's input ``[..., H]``."""
        return F.linear(states, self._head_weight)

    def _carried(self, hidden: Tensor) -> Tensor:
        """Return the state that the next depth carries; the layer's output, unless a subclass says otherwise."""
        return hidden

    def _read_by_head(self, carried: Tensor) -> Tensor:
        """Return the head's input; the carried state, unless a subclass says otherwise."""
        return carried

    # ---- serving ----------------------------------------------------------------------------------------------------

    @override
    def allocate(self, num_slots: int, max_length: int) -> None:
        weight, attention = self.fc.weight, self._layer.self_attn
        # The last column is for padding.
        shape = (num_slots, max_length + 1, attention.num_key_heads, attention.head_dim)
        self._cache = (weight.new_zeros(shape), weight.new_zeros(shape))
        self._state = weight.new_zeros(num_slots, self.config.hidden_size)
        self.cached = torch.zeros(num_slots, dtype=torch.int64)
        self.slot_adapters = torch.full((num_slots,), -1)

    @torch.inference_mode()
    @override
    @by_slot
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        tokens = tokens[:, 1:]
        device, rows = tokens.device, slots.to(tokens.device)
        positions = self.cached[slots].to(device)[:, None] + torch.arange(tokens.shape[1], device=device)
        x, residual = self._enter_at(tokens, features)
        columns = positions.clamp(max=self._cache[0].shape[1] - 1)
        for cache, new in zip(self._cache, self._layer.self_attn.keys_values(x, positions), strict=True):
            cache[rows[:, None], columns] = new
        end = int((self.cached[slots] + num_new).max())
        mask = torch.arange(end, device=device) <= positions[:, :, None]
        out = self._layer(x, residual, positions, self._sequence(slots, end), mask, None)
        last = (num_new - 1).to(device)[:, None, None].expand(-1, 1, out.shape[-1])
        self._state[rows] = self._carried(out.gather(1, last)[:, 0])
        self.cached[slots] += num_new

    @override
    def cache_rows(self, slot: int) -> list[Tensor]:
        return [cache[slot] for cache in self._cache]

    def _sequence(self, slots: Tensor, end: int) -> KeysValues:
        rows = rows_of(slots, self._cache[0].device)
        return self._cache[0][rows, :end], self._cache[1][rows, :end]

    def _embed(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding).to(self.fc.weight.dtype)

    def _enter_at(self, tokens: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Call :meth:`_enter` for tokens and the target's features at the positions before them."""
        return self._enter(self._embed(tokens), self._fuse(features.to(self.fc.weight.dtype)))

    def _log_probs(self, carried: Tensor) -> Tensor:
        return log_softmax(self._head(self._read_by_head(carried)))

    @torch.inference_mode()
    @override
    @by_slot
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        rows, end = slots.to(self._state.device), int(self.cached[slots].max())
        held, every = self.cached[slots].to(rows.device), torch.arange(len(rows), device=rows.device)[:, None]
        sequence, sequence_mask = self._sequence(slots, end), torch.arange(end, device=rows.device) < held[:, None]
        search = grow(self.draft_vocab, shape, generator)
        branch: KeysValues | None = None
        carried = self._state[rows, None]
        search.add(self._log_probs(carried))
        for depth in range(1, shape.depth):
            tokens, parent = search.frontier()
            positions = (held + depth - 1)[:, None].expand_as(tokens)
            # Each node of the frontier reads what it was drawn from.
            x, residual = self._enter(self._embed(tokens), carried[every, parent])
            own = tuple(part[:, :, None] for part in self._layer.self_attn.keys_values(x, positions))
            if branch is not None:
                own = tuple(torch.cat([b[every, parent], o], dim=2) for b, o in zip(branch, own, strict=True))
            branch = (own[0], own[1])
            mask = sequence_mask[:, None].expand(-1, tokens.shape[1], -1)
            carried = self._carried(self._layer(x, residual, positions, sequence, mask, branch))
            search.add(self._log_probs(carried))
        return search.proposal()

    # ---- training ---------------------------------------------------------------------------------------------------

    @override
    @by_request
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        # Only keys and values are computed at prompt positions. Query row c sits at pair t = P − 2 + c, which predicts
        # completion token c. At step j its anchor's pair is t − j, and it carries row c − 1 of step j − 1.
        offset, prompt = batch["sequence", "offset"], batch["sequence", "prompt_length"]
        count = offset.diff() - prompt
        tokens, x, residual, sequence = self._read_sequence(batch)
        pairs, width = tokens.shape[1], int(count.max())
        column = torch.arange(width, device=tokens.device)
        pair = prompt[:, None] - 2 + column
        inside = pair.clamp(0, pairs - 1)
        every = torch.arange(len(offset) - 1, device=tokens.device)[:, None]
        embedding = self._embed(tokens[every, inside])
        keep = column < count[:, None]

        states, valid, branch = [], [], None
        x, residual = x[every, inside], residual[every, inside]
        carried = residual
        for step in range(steps):
            if step:
                x, residual = self._enter(embedding, _next_row(carried))
                own = tuple(part[:, :, None] for part in self._layer.self_attn.keys_values(x, inside))
                if branch is not None:
                    own = tuple(torch.cat([_next_row(b), o], dim=2) for b, o in zip(branch, own, strict=True))
                branch = own
            seen = partial(_text, inside - step, pairs)
            carried = self._carried(self._learn(x, residual, inside, sequence, seen, branch))
            states.append(self._read_by_head(carried[keep]))
            valid.append(((column >= step) & (pair >= step))[keep])
        return Unroll([HeadLogits(each, self._head_weight) for each in states], torch.stack(valid), states)

    def _learn(
        self,
        x: Tensor,
        residual: Tensor,
        positions: Tensor,
        sequence: KeysValues,
        seen: Callable[[slice], Tensor],
        branch: tuple[Tensor, ...] | None,
    ) -> Tensor:
        """Call the layer; where it would keep many scores, for some rows at a time, and again in the backward pass.

        Arguments are the layer's, but for ``seen``: it returns the mask of some rows, which may leave out last keys
        that none of them sees.
        """
        keep = 2 if branch is not None else 0

        def some(rows: slice, x: Tensor, residual: Tensor, positions: Tensor, *more: Tensor) -> Tensor:
            own, mask = more[:keep], seen(rows)
            keys, values = (part[:, : mask.shape[2]] for part in more[keep:])
            return self._layer(x, residual, positions, (keys, values), mask, (own[0], own[1]) if own else None)

        per_row = len(x) * self._layer.self_attn.num_heads * sequence[0].shape[1]
        most, rows = _SCORES.get(x.device.type, _SCORES["cuda"]), (x, residual, positions, *(branch or ()))
        if per_row * x.shape[1] <= most:
            return some(slice(x.shape[1]), *rows, *sequence)
        return by_rows(some, max(most // 8 // per_row, 1), rows, sequence, list(self._layer.parameters()))

    def _read_sequence(self, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor, KeysValues]:
        """Return padded pairs of requests: tokens ``[n, T]``, attention's input, residual stream, keys and values."""
        offset = batch["sequence", "offset"]
        tokens = pad_rows(batch["sequence", "tokens"], offset)[:, 1:]
        rows = torch.arange(len(offset), device=offset.device)
        features = pad_rows(batch["sequence", "features"], offset - rows)
        x, residual = self._enter_at(tokens, features)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        return tokens, x, residual, self._layer.self_attn.keys_values(x, positions)

    @override
    @by_request
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        # One pass for each depth, over all contexts of that depth in the batch. Keys are laid flat: the sequence, then
        # the request's trees sorted by anchor, each depth-first. A sequence key is seen by the contexts whose root is
        # not before it, a node's key by the nodes from itself to the end of its subtree.
        requests = len(batch["sequence", "offset"]) - 1
        _, x, residual, sequence = self._read_sequence(batch)
        place = torch.zeros_like(trees.depth)  # place of a context among those of its depth
        of_request = batch["rounds", "offset"][batch["rounds", "request_offset"]]
        first = of_request[trees.request[trees.num_rounds :]]
        column = torch.arange(len(first), device=x.device) - first  # place of a node among those of its request
        end = pad_rows(trees.ends - first, of_request)
        keys = tuple(torch.cat([s, s.new_zeros(requests, end.shape[1], *s.shape[2:])], dim=1) for s in sequence)
        carried, states, order = residual, [], []
        for level in range(int(trees.depth[wanted].max()) + 1 if bool(wanted.any()) else 0):
            here = (trees.depth == level).nonzero().flatten()
            place[here] = torch.arange(len(here), device=here.device)
            request, root = trees.request[here], trees.root[here].clamp(min=0)
            # Contexts side by side by request, to share its sequence.
            counts = torch.bincount(request, minlength=requests)
            offset = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
            real = torch.arange(int(counts.max()), device=here.device) < counts[:, None]
            position = pad_rows(root + level, offset)
            read_keys, last = sequence, pad_rows(root, offset)
            seen: Callable[[slice], Tensor] = partial(_text, last, x.shape[1])
            if level == 0:
                read, stream = (pad_rows(part[request, root], offset) for part in (x, residual))
            else:
                nodes = here - trees.num_rounds
                # Each node reads what it was drawn from.
                tokens, above = pad_rows(batch["nodes", "tokens"][nodes], offset), place[trees.parent[nodes]]
                read, stream = self._enter(self._embed(tokens), pad_rows(carried[above], offset))
                own = self._layer.self_attn.keys_values(read, position)
                # Out of place: the depths before need their keys for their gradients.
                at = request, x.shape[1] + column[nodes]
                keys = tuple(k.index_put(at, o[real]) for k, o in zip(keys, own, strict=True))
                read_keys = keys[0], keys[1]
                seen = partial(_text_and_path, last, x.shape[1], pad_rows(column[nodes], offset), end)
            carried = self._carried(self._learn(read, stream, position, read_keys, seen, None)[real])
            asked = wanted[here]
            states.append(self._read_by_head(carried[asked]))
            order.append(here[asked])
        if not states:
            return x.new_zeros(0, len(self.draft_vocab))
        return HeadLogits(torch.cat(states)[torch.cat(order).argsort()], self._head_weight)


def _text(last: Tensor, size: int, rows: slice) -> Tensor:
    """Return the mask ``[b, t, S']`` of some queries, each of which sees the text up to its ``last``, ``[b, T]``.

    The text has ``size`` tokens. ``S'`` is one of four sizes: freed memory of ever other ones would seldom fit again.
    """
    last, step = last[:, rows, None], -(-size // 4)
    count = (int(last.max().clamp(min=0)) // step + 1) * step
    return torch.arange(min(count, size), device=last.device) <= last


def _text_and_path(last: Tensor, size: int, itself: Tensor, end: Tensor, rows: slice) -> Tensor:
    """Return the mask ``[b, t, S + N]`` of some nodes, which see the text up to ``last`` ``[b, T]`` and their path.

    ``itself`` ``[b, T]`` is a node's number among those of its text, ``end`` ``[b, N]`` one past its subtree's last.
    """
    text, node = (torch.arange(count, device=end.device) for count in (size, end.shape[1]))
    itself, end = itself[:, rows, None], end[:, None]
    return torch.cat([text <= last[:, rows, None], (node <= itself) & (itself < end)], dim=2)


def _next_row(x: Tensor) -> Tensor:
    """Move rows on by one along dim 1, with zeros first."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)

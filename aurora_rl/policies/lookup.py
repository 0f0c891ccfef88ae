"""Lookup: a text goes on as it, or an earlier answer, went on where its last tokens occurred before.

Lookup has no weights to train. In the request's own text it finds names, numbers and phrases (Saxena, "Prompt Lookup
Decoding", 2023), in earlier answers how this target says things (Oliaro et al., "SuffixDecoding", arXiv 2411.04975).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from typing_extensions import override

from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.drafter import Drafter, Proposal
from aurora_rl.policies.registry import register_drafter
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.tenants import tenant_of_salt
from aurora_rl.tree_index import TreeIndex

# Chosen on answers of the built-in traffic: tokens of the longest context; how many occurrences in earlier answers one
# in the request's own text is worth; how many the estimate by the next shorter context is; and the most occurrences
# that count, the latest ones.
_LONGEST, _OWN, _PRIOR, _COUNTED = 8, 16.0, 8.0, 512
# Chance of being accepted below which no row of a round pays, on any machine that was measured.
_LEAST = 0.05
# What a chance is worth that lookup states of a node whose parent is accepted: it is too sure, the more so the deeper.
_WORTH = 0.75
_END = -1  # stands after every earlier answer
_NOTHING = np.empty(0, dtype=np.int32)


class EarlierAnswers:
    """The newest answers of a server, in which lookup searches too.

    A request finds the answers to requests of its own salt, and all salts together are held to one bound.

    Args:
        capacity: Tokens to keep, of all salts together. Memory is that of twice as many at most.

    Example:
        >>> answers = EarlierAnswers(capacity=6)
        >>> answers.add([1, 2, 3])
        >>> answers.add([4, 5])
        >>> answers.tokens().tolist(), answers.tokens("another salt").tolist()
        ([2, 3, -1, 4, 5, -1], [])
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._held = capacity, 0
        self._lengths: deque[tuple[str | None, int]] = deque()  # salt and length of each answer, oldest first
        self._texts: dict[str | None, np.ndarray] = {}

    def tokens(self, salt: str | None = None) -> np.ndarray:
        """Return the answers of a salt in order, each followed by -1; the oldest may lack its beginning."""
        return self._texts.get(salt, _NOTHING)

    def add(self, answer: Sequence[int] | np.ndarray, salt: str | None = None) -> None:
        """Keep an answer, and forget the oldest ones for it, whatever their salt."""
        new = np.append(np.asarray(answer, dtype=np.int32), np.int32(_END))[-self._capacity :]
        while (excess := self._held + len(new) - self._capacity) > 0:
            oldest, length = self._lengths.popleft()
            dropped = min(length, excess)
            self._held -= dropped
            # A view, whose array is freed when the salt gets its next answer, or has none left.
            self._texts[oldest] = self._texts[oldest][dropped:]
            if dropped < length:
                self._lengths.appendleft((oldest, length - dropped))
            elif not len(self._texts[oldest]):
                del self._texts[oldest]
        self._texts[salt] = np.concatenate([self.tokens(salt), new])
        self._lengths.append((salt, len(new)))
        self._held += len(new)

    def delete(self, tenant: str) -> int:
        """Forget the answers to a tenant's requests, and return how many they were."""
        kept = deque(each for each in self._lengths if tenant_of_salt(each[0]) != tenant)
        deleted, self._lengths = len(self._lengths) - len(kept), kept
        self._texts = {salt: text for salt, text in self._texts.items() if tenant_of_salt(salt) != tenant}
        self._held = sum(length for _, length in kept)
        return deleted


def continuations(text: Sequence[int] | np.ndarray, earlier: np.ndarray | None = None) -> dict[int, float]:
    """Estimate the next token by how texts went on where the last tokens of a text occurred before.

    For each length from one to eight, tokens are counted that came after earlier places of so many last tokens. A place
    in the text itself counts 16, one in earlier answers 1. A length adds the estimate of the next shorter one, worth 8
    counts (MacKay and Peto, "A hierarchical Dirichlet language model", 1995). Chances sum to less than 1.

    Args:
        text: The text so far.
        earlier: Other texts, each followed by -1, see :meth:`EarlierAnswers.tokens`.

    Returns:
        Tokens with their chances, likeliest first; empty if the last token did not occur before.

    Example:
        >>> continuations([1, 2, 3, 1, 2, 4, 1, 2])
        {3: 0.48, 4: 0.48}
    """
    tokens = np.asarray(text, dtype=np.int64)
    if not len(tokens):
        return {}
    following, lengths = _occurrences(tokens, tokens)
    weights = np.full(len(following), _OWN)
    if earlier is not None:
        elsewhere, depth = _occurrences(earlier, tokens)
        inside = elsewhere != _END
        following = np.concatenate([following, elsewhere[inside]])
        lengths = np.concatenate([lengths, depth[inside]])
        weights = np.concatenate([weights, np.ones(int(inside.sum()))])
    if not len(following):
        return {}
    candidates, index = np.unique(following, return_inverse=True)
    chances, size = np.zeros(len(candidates)), 1
    while len(index):
        counts = np.bincount(index, weights=weights, minlength=len(candidates))
        chances = (counts + _PRIOR * chances) / (counts.sum() + _PRIOR)
        longer, size = lengths > size, size + 1
        index, weights, lengths = index[longer], weights[longer], lengths[longer]
    order = np.argsort(-chances, kind="stable")
    return dict(zip(candidates[order].tolist(), chances[order].tolist(), strict=True))


def _occurrences(texts: np.ndarray, context: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens ``[n]`` after a context's last token in texts, and how many before them are the context's too."""
    ends = np.flatnonzero(texts[:-1] == context[-1])[-_COUNTED:]
    lengths, alive = np.ones(len(ends), dtype=np.int64), np.arange(len(ends))
    for size in range(1, min(_LONGEST, len(context))):
        alive = alive[ends[alive] >= size]
        alive = alive[texts[ends[alive] - size] == context[-1 - size]]
        if not len(alive):
            break
        lengths[alive] += 1
    return texts[ends + 1].astype(np.int64), lengths


class Tree(NamedTuple):
    """A draft tree in topological order.

    Attributes:
        tokens: Token of each node.
        parents: Parent of each node, −1 = root.
        log_probs: Log-probability of each node given its path; −inf where the drafter did not draw it.
    """

    tokens: list[int]
    parents: list[int]
    log_probs: list[float]

    def kept(self, nodes: Sequence[int]) -> Tree:
        """Return the tree of some of the nodes, which rise and have their parents among them."""
        place = {-1: -1, **{node: i for i, node in enumerate(nodes)}}
        return Tree(
            [self.tokens[i] for i in nodes], [place[self.parents[i]] for i in nodes], [self.log_probs[i] for i in nodes]
        )


def ngram_tree(text: Sequence[int] | np.ndarray, shape: TreeShape, earlier: np.ndarray | None = None) -> Tree:
    """Return the likeliest nodes after a request's text so far, by :func:`continuations` of it and of each path.

    The nodes come by falling chance of their path. A chance that is stated of a token is worth three quarters of it,
    since it is too sure. Paths with a chance below 0.05 are left out.

    Example:
        >>> ngram_tree([1, 2, 3, 1, 2, 4, 5, 1, 2], TreeShape(2, 2, 3)).tokens
        [3, 4, 1]
    """
    tree = Tree([], [], [])
    # (negative chance of the path, order of arrival, parent, token, stated chance of the token, text before it)
    open_nodes: list[tuple[float, int, int, int, float, np.ndarray]] = []
    arrivals, tokens = itertools.count(), np.asarray(text, dtype=np.int64)

    def grow(parent: int, path: float, before: np.ndarray) -> None:
        for token, stated in list(continuations(before, earlier).items())[: shape.width]:
            if (chance := path * stated * _WORTH) >= _LEAST:
                heapq.heappush(open_nodes, (-chance, next(arrivals), parent, token, stated, before))

    if shape.depth:
        grow(-1, 1.0, tokens)
    while open_nodes and len(tree.tokens) < shape.num_nodes:
        path, _, parent, token, stated, before = heapq.heappop(open_nodes)
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.log_probs.append(math.log(stated))
        if len(before) + 1 - len(tokens) < shape.depth and len(tree.tokens) < shape.num_nodes:
            grow(len(tree.tokens) - 1, -path, np.append(before, token))
    return tree


def padded(trees: Sequence[Tree], width: int, device: torch.device) -> Proposal:
    """Return trees of unequal size as a proposal of ``width`` columns, padded after each."""
    tokens, parents = (torch.full((len(trees), width), fill, device=device) for fill in (0, -1))
    log_probs = torch.zeros(tokens.shape, dtype=torch.float32, device=device)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for row, tree in enumerate(trees):
        nodes = slice(len(tree.tokens))
        mask[row, nodes] = True
        for column, values in zip((tokens, parents, log_probs), tree, strict=True):
            column[row, nodes] = torch.tensor(values, dtype=column.dtype, device=device)
    return Proposal(tokens, parents, log_probs, mask=mask)


@register_drafter("ngram")
class NgramDrafter(Drafter):
    """Lookup as a drafter of its own, with nothing to learn and nothing to save.

    Args:
        vocab_size: Size of the target's vocabulary; every token has a row.

    Example:
        >>> drafter = NgramDrafter(vocab_size=10)
        >>> drafter.allocate(num_slots=1, max_length=16)
        >>> text = torch.tensor([[7, 1, 2, 3, 4, 1, 2]])
        >>> drafter.extend(torch.tensor([0]), text, torch.zeros(1, 6, 0), torch.tensor([6]))
        >>> drafter.propose(torch.tensor([0]), TreeShape(depth=3)).tokens
        tensor([[3, 4, 1]])
    """

    draft_modes: ClassVar[tuple[str, ...]] = ("topk",)
    formats: ClassVar[tuple[str, ...]] = ()

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.feature_layers, self.vocab_size = (), vocab_size
        self.register_buffer("draft_vocab", torch.arange(vocab_size), persistent=False)

    @classmethod
    @override
    def from_target(
        cls, parts: TargetParts, *, draft_vocab: Tensor, feature_layers: tuple[int, ...] | None = None
    ) -> Self:
        return cls(len(parts.head))  # whatever the target's weights and the draft vocabulary

    # ---- serving ----------------------------------------------------------------------------------------------------

    @override
    def allocate(self, num_slots: int, max_length: int) -> None:
        self._text = [np.zeros(0, dtype=np.int64)] * num_slots
        self.cached = torch.zeros(num_slots, dtype=torch.int64)

    @override
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        held, rows = self.cached[slots].tolist(), tokens.cpu().numpy()
        for slot, before, row, count in zip(slots.tolist(), held, rows, num_new.tolist(), strict=True):
            # What is held ends with the first token of the new pairs.
            self._text[slot] = np.concatenate([self._text[slot][:before], row[: count + 1]])
        self.cached[slots] += num_new

    @override
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        if shape.mode not in self.draft_modes:
            raise ValueError(f"n-grams have no distribution over all tokens to draw from; mode {shape.mode!r}")
        trees = [ngram_tree(self._text[slot][: int(self.cached[slot]) + 1], shape) for slot in slots.tolist()]
        return padded(trees, shape.num_nodes, self.draft_vocab.device)

    # ---- training ---------------------------------------------------------------------------------------------------

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        sequence = batch["sequence", "tokens"].tolist()
        start = batch["sequence", "offset"].tolist()
        paths: list[list[int]] = [[] for _ in range(trees.num_rounds)]
        for parent, token in zip(trees.parent.tolist(), batch["nodes", "tokens"].tolist(), strict=True):
            paths.append([*paths[parent], token])
        logits = torch.zeros(int(wanted.sum()), self.vocab_size, dtype=torch.float32, device=wanted.device)
        for row, context in enumerate(wanted.nonzero().flatten().tolist()):
            first = start[int(trees.request[context])]
            text = sequence[first : first + int(trees.root[context]) + 2]
            if following := continuations(text + paths[context]):
                # What is left of the chances is that of all tokens that were not found.
                rest = (1 - sum(following.values())) / max(self.vocab_size - len(following), 1)
                logits[row] = math.log(rest)
                for token, probability in following.items():
                    logits[row, token] = math.log(probability)
        return logits

    @classmethod
    @override
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        return False

"""Lookup: a text goes on as it went on when its last tokens occurred before.

Saxena, "Prompt Lookup Decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding). Lookup has no weights, costs
next to nothing, and proposes what a young drafter cannot know: names, numbers and phrases of the request itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from typing_extensions import override

from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.drafter import Drafter, Proposal, TreeShape
from aurora_rl.policies.registry import register_drafter
from aurora_rl.tree_index import TreeIndex

# Most and fewest tokens that must agree. The longest match counts; a single token matches by chance too often to pay.
_LONGEST, _SHORTEST = 4, 2
# Number of occurrences that count. Older ones have less than a part in four billion of the weight.
_COUNTED = 32


def continuations(text: Sequence[int] | np.ndarray) -> dict[int, float]:
    """Estimate the next token by how the text went on when its last tokens occurred before.

    The longest run of four to two last tokens that occurred earlier counts. Each occurrence has twice the weight of the
    one before it, so that the latest is never outvoted; 32 occurrences count.

    Returns:
        Tokens with their probabilities, likeliest first; empty if the last two tokens did not occur before.

    Example:
        >>> continuations([1, 2, 3, 1, 2, 4, 1, 2])
        {4: 0.6666666666666666, 3: 0.3333333333333333}
    """
    tokens = np.asarray(text, dtype=np.int64)
    # Where the last token stood before; then, of these places, where the one before it did too, and so on.
    ends, size = np.flatnonzero(tokens[:-1] == tokens[-1:]), 1
    while len(ends) and size < _LONGEST:
        longer = ends[ends >= size]
        longer = longer[tokens[longer - size] == tokens[-1 - size]]
        if not len(longer):
            break
        ends, size = longer, size + 1
    if size < _SHORTEST:
        return {}
    weights: dict[int, float] = {}
    for age, token in enumerate(reversed(tokens[ends[-_COUNTED:] + 1].tolist())):
        weights[token] = weights.get(token, 0.0) + 0.5**age
    total = sum(weights.values())
    return {token: w / total for token, w in sorted(weights.items(), key=lambda item: -item[1])}


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


def ngram_tree(text: Sequence[int] | np.ndarray, shape: TreeShape) -> Tree:
    """Return the likeliest nodes after a request's text so far, by :func:`continuations` of it and of each path.

    Example:
        >>> ngram_tree([1, 2, 3, 1, 2, 4, 5, 1, 2], TreeShape(2, 2, 3)).tokens
        [4, 5, 3]
    """
    tree = Tree([], [], [])
    # (negative joint log-probability, order of arrival, parent, token, log-probability, text before the token)
    open_nodes: list[tuple[float, int, int, int, float, np.ndarray]] = []
    arrived = 0

    def grow(parent: int, joint: float, before: np.ndarray) -> None:
        nonlocal arrived
        for token, probability in list(continuations(before).items())[: shape.width]:
            log_prob = math.log(probability)
            heapq.heappush(open_nodes, (joint - log_prob, arrived, parent, token, log_prob, before))
            arrived += 1

    tokens = np.asarray(text, dtype=np.int64)
    if shape.depth:
        grow(-1, 0.0, tokens)
    while open_nodes and len(tree.tokens) < shape.num_nodes:
        joint, _, parent, token, log_prob, before = heapq.heappop(open_nodes)
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.log_probs.append(log_prob)
        if len(before) + 1 - len(tokens) < shape.depth:
            grow(len(tree.tokens) - 1, joint, np.append(before, token))
    return tree


def merged(tree: Tree, found: Tree, num_nodes: int) -> Tree:
    """Add a tree that was looked up to a drafter's, sharing the nodes that both have.

    Args:
        tree: Tree of the drafter.
        found: Tree that was looked up, of at most ``num_nodes`` nodes. They displace the drafter's least likely ones:
            a repetition in the text is a better guess.
        num_nodes: Most nodes of the result.

    Returns:
        The new tree. Nodes that were only looked up have a log-probability of −inf.

    Example:
        >>> found = Tree([7, 8], [-1, 0], [0.0, 0.0])
        >>> merged(Tree([5, 7, 6], [-1, -1, 0], [-0.9, -0.5, -2.0]), found, num_nodes=3)
        Tree(tokens=[5, 7, 8], parents=[-1, -1, 1], log_probs=[-0.9, -0.5, -inf])
    """
    both = Tree(tree.tokens.copy(), tree.parents.copy(), tree.log_probs.copy())
    index = {pair: node for node, pair in enumerate(zip(both.parents, both.tokens, strict=True))}
    place = {-1: -1}  # of each node that was looked up, in the result
    for node, (token, parent) in enumerate(zip(found.tokens, found.parents, strict=True)):
        place[node] = index.setdefault((place[parent], token), len(both.tokens))
        if place[node] == len(both.tokens):
            both.tokens.append(token)
            both.parents.append(place[parent])
            both.log_probs.append(-math.inf)
    joint: list[float] = []
    for parent, log_prob in zip(both.parents, both.log_probs, strict=True):
        joint.append(log_prob + (joint[parent] if parent >= 0 else 0.0))
    needed = {node for node in place.values() if node >= 0}
    # A node is no likelier than its parent and comes after it, so what is kept is a tree.
    optional = sorted((i for i in range(len(both.tokens)) if i not in needed), key=lambda i: -joint[i])
    return both.kept(sorted(needed.union(optional[: num_nodes - len(needed)])))


def padded(trees: Sequence[Tree], width: int, device: torch.device) -> Proposal:
    """Return trees of unequal size as a proposal of ``width`` columns, padded after each."""
    tokens, parents = (torch.full((len(trees), width), fill, device=device) for fill in (0, -1))
    log_probs = torch.zeros(tokens.shape, device=device)
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
        logits = torch.zeros(int(wanted.sum()), self.vocab_size, device=wanted.device)
        for row, context in enumerate(wanted.nonzero().flatten().tolist()):
            first = start[int(trees.request[context])]
            text = sequence[first : first + int(trees.root[context]) + 2]
            if following := continuations(text + paths[context]):
                logits[row] = -math.inf
                for token, probability in following.items():
                    logits[row, token] = math.log(probability)
        return logits

    @classmethod
    @override
    def recognizes(cls, config: Mapping[str, Any]) -> bool:
        return False

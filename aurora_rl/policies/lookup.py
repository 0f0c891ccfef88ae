"""Prompt lookup: the continuation of a text as it went on when its last tokens occurred before.

Saxena, "Prompt Lookup Decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding). It has no weights, costs next to
nothing, and proposes what a young drafter cannot know: names, numbers and phrases of the request itself.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

# Tokens that must agree: the longest match counts, and one token alone is met by chance too often to pay for its rows.
_LONGEST, _SHORTEST = 4, 2


def lookup(text: Tensor, count: int) -> list[int]:
    """Up to ``count`` tokens that followed the latest earlier occurrence of the end of ``text``.

    Args:
        text: ``[n]`` int64, a request so far, prompt and completion.
        count: most tokens to return.

    Returns:
        Target token ids; none where the last two tokens did not occur before.

    Example:
        >>> import torch
        >>> lookup(torch.tensor([7, 1, 2, 3, 4, 9, 1, 2]), 3)
        [3, 4, 9]
    """
    for size in range(min(_LONGEST, len(text) - 1), _SHORTEST - 1, -1):
        # Every run of `size` tokens but the last, which is the one looked for.
        same = (text.unfold(0, size, 1)[:-1] == text[-size:]).all(1).nonzero()
        if len(same):
            end = int(same[-1]) + size
            return text[end : end + count].tolist()
    return []


class Tree(NamedTuple):
    """A draft tree in topological order.

    Attributes:
        tokens: of the nodes.
        parents: likewise, −1 = root.
        log_probs: of each node given its path; −inf where the drafter did not draw it.
    """

    tokens: list[int]
    parents: list[int]
    log_probs: list[float]


def merge_chain(tree: Tree, chain: list[int], budget: int) -> Tree:
    """Add a chain behind the root of a tree, sharing the nodes that are there already.

    Args:
        tree: of a drafter.
        chain: tokens of a path from the root, at most ``budget``.
        budget: most nodes of the result. What the chain needs, the drafter's least likely nodes make room for: a
            repetition in the text is a better guess than they are.

    Returns:
        The new tree.

    Example:
        >>> merge_chain(Tree([5, 7, 6], [-1, -1, 0], [-0.9, -0.5, -2.0]), [7, 8], budget=3)
        Tree(tokens=[5, 7, 8], parents=[-1, -1, 1], log_probs=[-0.9, -0.5, -inf])
    """
    tokens, parents, log_probs = tree.tokens.copy(), tree.parents.copy(), tree.log_probs.copy()
    parent, path = -1, set[int]()
    for token in chain:
        known = (i for i in range(len(tokens)) if parents[i] == parent and tokens[i] == token)
        node = next(known, len(tokens))
        if node == len(tokens):
            tokens.append(token)
            parents.append(parent)
            log_probs.append(-math.inf)
        path.add(node)
        parent = node
    joint: list[float] = []
    for parent, log_prob in zip(parents, log_probs, strict=True):
        joint.append(log_prob + (joint[parent] if parent >= 0 else 0.0))
    # A node is no likelier than its parent and comes behind it, so what is kept is a tree.
    others = sorted((i for i in range(len(tokens)) if i not in path), key=lambda i: -joint[i])
    keep = sorted(path.union(others[: budget - len(path)]))
    place = {-1: -1, **{old: new for new, old in enumerate(keep)}}
    return Tree([tokens[i] for i in keep], [place[parents[i]] for i in keep], [log_probs[i] for i in keep])

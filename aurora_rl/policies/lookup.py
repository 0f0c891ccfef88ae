"""Prompt lookup: the continuation of a text as it went on when its last tokens occurred before.

Saxena, "Prompt Lookup Decoding" (2023, github.com/apoorvumang/prompt-lookup-decoding). It has no weights, costs next to
nothing, and proposes what a young drafter cannot know: names, numbers and phrases of the request itself.
"""

from __future__ import annotations

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


def merge_chain(tokens: list[int], parents: list[int], chain: list[int]) -> int:
    """Add a chain behind the root of a tree, sharing the nodes that are there already.

    Args:
        tokens: of the tree's nodes, in topological order; new nodes are appended.
        parents: likewise, −1 = root.
        chain: tokens of a path from the root.

    Returns:
        The number of nodes added.

    Example:
        >>> tokens, parents = [5, 7, 6], [-1, -1, 0]
        >>> merge_chain(tokens, parents, [7, 8]), tokens, parents
        (1, [5, 7, 6, 8], [-1, -1, 0, 1])
    """
    at, before = -1, len(tokens)
    for token in chain:
        known = (i for i in range(len(tokens)) if parents[i] == at and tokens[i] == token)
        node = next(known, len(tokens))
        if node == len(tokens):
            tokens.append(token)
            parents.append(at)
        at = node
    return len(tokens) - before

"""Draft trees as padded parent arrays: pure functions on tensors.

A batch of ``B`` draft trees has ``N`` padded nodes each. The root, the last committed token, is not a node. ``parents``
holds -1 for a child of the root and otherwise the index of an earlier node, so nodes are in topological order. Where
the root takes part it is column 0 of ``D = N + 1`` columns and node ``i`` is column ``i + 1``.

``valid_nodes`` projects arbitrary nodes onto a legal tree. The other batched functions read a parent that is out of
range as the root, so that no input indexes out of bounds. Their results at invalid nodes are undefined.

Arguments of these names are ``tokens`` and ``parents`` ``[B, N]`` int64, the token and the parent of each node;
``valid`` ``[B, N]`` bool, the result of ``valid_nodes``; and ``accepted`` ``[B, N]`` bool, the result of ``walk``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _links(parents: Tensor) -> Tensor:
    """Return every column's parent column, ``[B, N + 1]``; root and nodes with an illegal parent link to the root."""
    index = torch.arange(parents.shape[1], device=parents.device)
    legal = (parents >= -1) & (parents < index)
    return F.pad(torch.where(legal, parents + 1, 0), (1, 0))


def _hold_to_root(good: Tensor, links: Tensor) -> Tensor:
    """Keep a node if it and its ancestors are good. ``good`` is ``[B, N]`` bool, ``links`` the result of ``_links``."""
    # Pointer doubling: after k rounds a column has heard from its 2**k nearest columns on the way to the root.
    held = F.pad(good, (1, 0), value=True)
    for _ in range((good.shape[1] - 1).bit_length()):
        held = held & held.gather(1, links)
        links = links.gather(1, links)
    return held[:, 1:]


def depths(parents: Tensor) -> Tensor:
    """Return the distance of every node from the root, ``[B, N]`` int64: 1 for a child of the root.

    >>> depths(torch.tensor([[-1, 0, 0, 2]]))
    tensor([[1, 2, 2, 3]])
    """
    links = _links(parents)
    distance = F.pad(torch.ones_like(parents), (1, 0))
    for _ in range((parents.shape[1] - 1).bit_length()):
        distance = distance + distance.gather(1, links)
        links = links.gather(1, links)
    return distance[:, 1:]


def sibling_ranks(context: Tensor) -> Tensor:
    """Return the place of every node among the nodes of its context (``[M]`` int64), in order of index, ``[M]`` int64.

    >>> sibling_ranks(torch.tensor([0, 0, 2, 0, 2]))
    tensor([0, 1, 0, 2, 1])
    """
    if not len(context):
        return context
    order = context.argsort(stable=True)
    _, count = context[order].unique_consecutive(return_counts=True)
    first = torch.repeat_interleave(count.cumsum(0) - count, count)
    return torch.empty_like(context).scatter_(0, order, torch.arange(len(context), device=context.device) - first)


def repeated_siblings(context: Tensor, tokens: Tensor) -> Tensor:
    """Return which nodes carry a token (``[M]`` int64) that an earlier node of their context (``[M]`` int64) carries.

    >>> repeated_siblings(torch.tensor([0, 0, 2, 0, 2]), torch.tensor([5, 7, 5, 5, 6]))
    tensor([False, False, False,  True, False])
    """
    if not len(context):
        return context.bool()
    _, pair = torch.stack([context, tokens]).unique(dim=1, return_inverse=True)
    return sibling_ranks(pair) > 0


def valid_nodes(tokens: Tensor, parents: Tensor, mask: Tensor, vocab_size: int, *, repeats: bool = False) -> Tensor:
    """Project arbitrary nodes onto a legal tree: return the nodes that may be verified, ``[B, N]`` bool.

    A node is dropped if it is masked out or if its token is outside the vocabulary. It is dropped if its parent is, or
    if that is neither an earlier node nor the root. It is also dropped if an earlier surviving sibling has
    the same token, so that the path that verification accepts is unique. ``repeats`` keeps such siblings, as
    independent draws give them.
    ``mask`` ``[B, N]`` bool are the nodes that the drafter proposes.

    >>> tokens, parents = torch.tensor([[5, 5, 7, 9]]), torch.tensor([[-1, -1, 1, 0]])
    >>> valid_nodes(tokens, parents, torch.ones(1, 4, dtype=torch.bool), vocab_size=10)
    tensor([[ True, False, False,  True]])
    """
    index = torch.arange(tokens.shape[1], device=tokens.device)
    sound = mask & (tokens >= 0) & (tokens < vocab_size) & (parents >= -1) & (parents < index)
    if repeats:
        return _hold_to_root(sound, _links(parents))
    # Siblings share their parent's fate, so a repeat can be told from sound siblings alone: if the parent survives,
    # the first of them survives; if it does not, all of them fall anyway.
    twins = (tokens[:, :, None] == tokens[:, None, :]) & (parents[:, :, None] == parents[:, None, :])
    repeated = (twins & sound[:, None, :]).tril(-1).any(-1)
    return _hold_to_root(sound & ~repeated, _links(parents))


def tree_fault(tokens: Tensor, parents: Tensor, mask: Tensor, vocab_size: int, *, repeats: bool = False) -> str | None:
    """Return why one tree (arguments of ``valid_nodes``, without ``B``) is not legal; None if that would drop nothing.

    >>> tree_fault(torch.tensor([5, 7, 5]), torch.tensor([-1, 2, -1]), torch.ones(3, dtype=torch.bool), vocab_size=10)
    'node 1 has parent 2, which is no earlier node'
    """
    seen: dict[tuple[int, int], int] = {}
    for node in mask.nonzero().flatten().tolist():
        token, parent = int(tokens[node]), int(parents[node])
        if not 0 <= token < vocab_size:
            return f"node {node} has token {token}, outside the target's vocabulary of {vocab_size}"
        if not -1 <= parent < node:
            return f"node {node} has parent {parent}, which is no earlier node"
        if parent >= 0 and not bool(mask[parent]):
            return f"node {node} has parent {parent}, which is masked out"
        if not repeats and (twin := seen.setdefault((parent, token), node)) != node:
            return f"nodes {twin} and {node} are siblings with the same token {token}"
    return None


def ancestor_mask(parents: Tensor, valid: Tensor) -> Tensor:
    """Return which columns a row attends to, ``[B, N + 1, N + 1]`` bool: itself and its ancestors, the root included.

    An invalid node sees itself and is seen by itself only: its row stays non-empty, which keeps softmax finite.

    >>> ancestor_mask(torch.tensor([[-1, -1, 1]]), torch.ones(1, 3, dtype=torch.bool)).int()
    tensor([[[1, 0, 0, 0],
             [1, 1, 0, 0],
             [1, 0, 1, 0],
             [1, 0, 1, 1]]], dtype=torch.int32)
    """
    links = _links(parents)
    columns = links.shape[1]
    itself = torch.eye(columns, dtype=torch.bool, device=parents.device)
    seen = itself.expand(parents.shape[0], columns, columns)
    for _ in range(parents.shape[1].bit_length()):
        seen = seen | seen.gather(1, links[:, :, None].expand_as(seen))
        links = links.gather(1, links)
    real = F.pad(valid, (1, 0), value=True)
    return seen & real[:, :, None] & real[:, None, :] | itself


def walk(tokens: Tensor, parents: Tensor, valid: Tensor, choices: Tensor) -> Tensor:
    """Follow the target's choices down the tree; return the accepted nodes, ``[B, N]`` bool: one path from the root.

    A node is accepted when it and each of its ancestors carry the token that the target chose at the node before. Of
    repeated siblings the first counts. ``choices`` ``[B, N + 1]`` int64 are the target's at the root and after every
    node, -1 if there is none.

    >>> tokens, parents = torch.tensor([[4, 6, 8]]), torch.tensor([[-1, -1, 1]])
    >>> walk(tokens, parents, torch.ones(1, 3, dtype=torch.bool), torch.tensor([[6, 0, 8, 2]]))
    tensor([[False,  True,  True]])
    """
    links = _links(parents)
    chosen = valid & (choices.gather(1, links[:, 1:]) == tokens)
    siblings = links[:, 1:, None] == links[:, None, 1:]
    repeated = (siblings & chosen[:, None, :]).tril(-1).any(-1)
    return _hold_to_root(chosen & ~repeated, links)


def accepted_path(accepted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the accepted nodes by depth, ``[B, N]`` int64 indices padded with -1, and their number, ``[B]`` int64.

    >>> accepted_path(torch.tensor([[False, True, False, True]]))
    (tensor([[ 1,  3, -1, -1]]), tensor([2]))
    """
    # Parents come before children, so along one path the order of depth is the order of index.
    num_nodes = accepted.shape[1]
    index = torch.arange(num_nodes, device=accepted.device)
    ordered = torch.where(accepted, index, num_nodes).sort(1).values
    return ordered.masked_fill(ordered == num_nodes, -1), accepted.sum(1)


def last_accepted(accepted: Tensor) -> Tensor:
    """Return the column of the last accepted node, where the bonus token is chosen, ``[B]`` int64; 0 if there is none.

    >>> last_accepted(torch.tensor([[False, True, False], [False, False, False]]))
    tensor([2, 0])
    """
    columns = torch.arange(accepted.shape[1] + 1, device=accepted.device)
    return (F.pad(accepted, (1, 0), value=True) * columns).amax(1)


def reorder_depth_first(parents: Tensor) -> tuple[Tensor, Tensor]:
    """Rewrite one tree (``[n]`` int64, without padding) in depth-first order, as in a packed trajectory.

    Returns:
        The order, ``[n]`` int64, by which to index every array of nodes, and the parents in that order, ``[n]`` int64.

    Raises:
        ValueError: A parent is neither -1 nor an earlier node.

    >>> reorder_depth_first(torch.tensor([-1, -1, 0, 1, 0]))
    (tensor([0, 2, 4, 1, 3]), tensor([-1,  0,  0, -1,  3]))
    """
    children: list[list[int]] = [[] for _ in range(len(parents) + 1)]
    for node, parent in enumerate(parents.tolist()):
        if not -1 <= parent < node:
            raise ValueError(
                f"node {node} has parent {parent}, expected -1 or an earlier node; drop invalid nodes before reordering"
            )
        children[parent + 1].append(node)
    visited: list[int] = []
    stack = children[0][::-1]
    while stack:
        visited.append(stack.pop())
        stack.extend(reversed(children[visited[-1] + 1]))
    order = torch.tensor(visited, dtype=torch.int64, device=parents.device)
    # One slot more, for the root: it stays -1, and -1 indexes it.
    position = torch.full((len(order) + 1,), -1, dtype=torch.int64, device=parents.device)
    position[order] = torch.arange(len(order), device=parents.device)
    return order, position[parents[order]]

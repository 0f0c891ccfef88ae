"""The contexts of packed trajectories: recorded trees, and chains of the text's own tokens in their place.

Legend: ``C`` completion tokens of a batch, ``J`` unroll steps, ``R`` rounds and ``M`` nodes of a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aurora_kernels.trees import depths

SEQUENCE_KEYS: list[NestedKey] = [("sequence", key) for key in ("tokens", "offset", "prompt_length", "features")]
"""Entries of a batch that ``Drafter.unroll`` reads."""

TREE_KEYS: list[NestedKey] = [
    *SEQUENCE_KEYS,
    *(("rounds", key) for key in ("offset", "anchor", "request_offset")),
    *(("nodes", key) for key in ("tokens", "parents")),
]
"""Entries of a batch that :class:`TreeIndex` and ``Drafter.context_logits`` read."""


class TreeIndex(NamedTuple):
    """Index of the contexts of packed trajectories: first the roots of all ``R`` rounds, then all ``M`` nodes.

    Attributes:
        num_rounds: Number of rounds ``R``.
        request: Request of each context, ``[R + M]`` int64.
        root: Pair of its tree's root, ``[R + M]`` int64. −1 if the root is the first token of a text, which has no
            pair: nothing can be drafted from it.
        depth: Depth of each context, ``[R + M]`` int64, 0 at a root.
        parent: Context that each node was drawn from, ``[M]`` int64.

    Example:
        >>> rounds = {"anchor": [4], "offset": [0, 3], "request_offset": [0, 1]}
        >>> batch = TensorDict({"rounds": {name: torch.tensor(value) for name, value in rounds.items()}}, batch_size=[])
        >>> batch["nodes", "parents"] = torch.tensor([-1, 0, -1])
        >>> trees = TreeIndex.of(batch)
        >>> trees.depth, trees.parent, trees.ends
        (tensor([0, 1, 2, 1]), tensor([0, 1, 0]), tensor([2, 2, 3]))
    """

    num_rounds: int
    request: Tensor
    root: Tensor
    depth: Tensor
    parent: Tensor

    @classmethod
    def of(cls, batch: TensorDictBase) -> TreeIndex:
        """Read a packed batch, or return the index that :func:`indexed` has put into it."""
        if "tree_index" in batch.keys():
            return batch["tree_index"]
        offset, parents, anchor = batch["rounds", "offset"], batch["nodes", "parents"], batch["rounds", "anchor"]
        rounds = torch.arange(len(anchor), device=anchor.device)
        drafted_in = torch.repeat_interleave(rounds, offset.diff())
        above = parents + offset[drafted_in]  # a node's place among all nodes, where it has a parent
        depth = depths(torch.where(parents < 0, -1, above)[None])[0]
        request = torch.repeat_interleave(batch["rounds", "request_offset"].diff())
        return cls(
            num_rounds=len(rounds),
            request=torch.cat([request, request[drafted_in]]),
            root=torch.cat([anchor, anchor[drafted_in]]) - 1,
            depth=torch.cat([torch.zeros_like(rounds), depth]),
            parent=torch.where(parents < 0, drafted_in, len(rounds) + above),
        )

    @property
    def drawn_from(self) -> Tensor:
        """Contexts that nodes were drawn from, ``[R + M]`` bool."""
        drawn_from = torch.zeros_like(self.depth, dtype=torch.bool)
        drawn_from[self.parent] = True
        return drawn_from

    @property
    def context(self) -> Tensor:
        """Context that each node was drawn from, counted among :attr:`drawn_from` alone, ``[M]`` int64."""
        return (self.drawn_from.cumsum(0) - 1)[self.parent]

    @property
    def ends(self) -> Tensor:
        """One past the last node of the subtree of each node, among all nodes of the batch, ``[M]`` int64.

        Node ``j`` is node ``i`` or an ancestor of it where ``j <= i < ends[j]``.

        Raises:
            ValueError: The nodes of a tree are not depth-first, so that no interval holds a subtree.
        """
        sizes = self.subtree_sums(torch.ones_like(self.parent))[self.num_rounds :]
        ends = torch.arange(len(self.parent), device=self.parent.device) + sizes
        above = self.parent - self.num_rounds
        if bool(((above >= 0) & (ends > ends[above.clamp(min=0)])).any()):
            raise ValueError(
                "('nodes', 'parents') is not depth-first; order it by aurora_kernels.trees.reorder_depth_first"
            )
        return ends

    def path_products(self, factors: Tensor) -> Tensor:
        """Multiply the factors ``[M]`` of nodes along the path from the root to each, its own included: ``[M]``.

        Example:
            >>> chain = TreeIndex(1, *(torch.tensor(x) for x in ([0] * 3, [4] * 3, [0, 1, 2], [0, 1])))
            >>> chain.path_products(torch.tensor([0.5, 0.5]))
            tensor([0.5000, 0.2500])
        """
        products = torch.cat([factors.new_ones(self.num_rounds), factors])
        depth = self.depth[self.num_rounds :]
        for level in range(2, int(depth.max()) + 1 if len(depth) else 0):
            here = (depth == level).nonzero().flatten()
            products = products.index_copy(0, here + self.num_rounds, products[self.parent[here]] * factors[here])
        return products[self.num_rounds :]

    def subtree_sums(self, values: Tensor) -> Tensor:
        """Sum values ``[M]`` of nodes over each context and all nodes below it: ``[R + M]``, at a root over its tree.

        Example:
            >>> chain = TreeIndex(1, *(torch.tensor(x) for x in ([0] * 3, [4] * 3, [0, 1, 2], [0, 1])))
            >>> chain.subtree_sums(torch.tensor([1.0, 2.0]))
            tensor([3., 3., 2.])
        """
        sums = torch.cat([values.new_zeros(self.num_rounds), values])
        depth = self.depth[self.num_rounds :]
        for level in range(int(depth.max()) if len(depth) else 0, 0, -1):
            here = (depth == level).nonzero().flatten()
            sums = sums.index_add(0, self.parent[here], sums[here + self.num_rounds])
        return sums


def completion_columns(batch: TensorDictBase) -> tuple[Tensor, Tensor]:
    """Return the request of each completion token and its place in the completion, ``[C]`` int64 each.

    Example:
        >>> sequence = {"offset": torch.tensor([0, 3, 5]), "prompt_length": torch.tensor([1, 1])}
        >>> completion_columns(TensorDict({"sequence": sequence}))
        (tensor([0, 0, 1]), tensor([0, 1, 0]))
    """
    count = batch["sequence", "offset"].diff() - batch["sequence", "prompt_length"]
    request = torch.repeat_interleave(count)
    return request, torch.arange(len(request), device=count.device) - (count.cumsum(0) - count)[request]


def indexed(batch: TensorDictBase) -> TensorDictBase:
    """Return a shallow copy of a packed batch that carries its :class:`TreeIndex`, for several readers.

    Example:
        >>> rounds = {"anchor": [4], "offset": [0, 1], "request_offset": [0, 1]}
        >>> batch = TensorDict({"rounds": {name: torch.tensor(value) for name, value in rounds.items()}}, batch_size=[])
        >>> batch["nodes", "parents"] = torch.tensor([-1])
        >>> shared = indexed(batch)
        >>> TreeIndex.of(shared) is TreeIndex.of(shared)
        True
    """
    return batch.copy().set_non_tensor("tree_index", TreeIndex.of(batch))


def true_chains(batch: TensorDictBase, steps: int) -> tuple[TensorDict, Tensor, Tensor]:
    """Replace the rounds of a batch: after each anchor, a chain of the tokens that the text continues with.

    Args:
        batch: Packed trajectories, see ``aurora_rl.trajectories.pack``.
        steps: Length ``J`` of the longest chain.

    Returns:
        A tuple of three. The batch has the same sequences, with these rounds and nodes. ``[J, C]`` int64 names the node
        that is completion token ``c`` at depth ``j + 1``, −1 if there is no anchor. ``[J, C]`` bool tells whether it
        can be drafted: nothing can be drafted from the first token of a text, which has no feature before it.
    """
    offset, prompt = batch["sequence", "offset"], batch["sequence", "prompt_length"]
    count, (request, column) = offset.diff() - prompt, completion_columns(batch)
    device, place = offset.device, torch.arange(len(request), device=offset.device)
    # Completion token c is predicted, at step 0, from the anchor one position before it.
    anchor = prompt[request] - 1 + column
    length = (count[request] - column).clamp(max=steps)
    start = torch.cat([length.new_zeros(1), length.cumsum(0)])
    step = torch.arange(int(start[-1]), device=device) - torch.repeat_interleave(start[:-1], length)
    token = offset[request] + prompt[request] + column  # place of each completion token in the packed sequence
    tokens = batch["sequence", "tokens"][token[torch.repeat_interleave(place, length) + step]]
    request_offset = torch.cat([count.new_zeros(1), count.cumsum(0)])
    chains = TensorDict(
        {
            "sequence": batch["sequence"],
            "rounds": {"anchor": anchor, "offset": start, "request_offset": request_offset},
            "nodes": {"tokens": tokens, "parents": step - 1, "request_offset": start[request_offset]},
        },
        batch_size=[],
    )
    depth = torch.arange(steps, device=device)[:, None]
    from_anchor = place - depth
    there = column >= depth
    node = torch.where(there, start[from_anchor.clamp(min=0)] + depth, -1)
    return chains, node, there & (anchor[from_anchor.clamp(min=0)] >= 1)

"""Build trees from a drafter's log-probabilities: its likeliest nodes, or chains drawn at random.

Legend: ``b`` slots, ``w`` nodes of a frontier, ``n`` nodes of a tree, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_rl.policies.drafter import Proposal
from aurora_rl.policies.tree_shape import TreeShape


def best_first(tokens: Tensor, parents: Tensor, log_probs: Tensor, joint: Tensor, num_nodes: int) -> Proposal:
    """Keep the ``num_nodes`` likeliest of candidates ``[b, n]`` in topological order by their joint log-probability.

    A node's joint log-probability is at most its parent's, and ties keep the earlier node, so what is kept is a tree.
    """
    if tokens.shape[1] > num_nodes:
        keep = joint.sort(dim=1, descending=True, stable=True).indices[:, :num_nodes].sort(dim=1).values
        place = torch.full_like(parents, -1)
        place.scatter_(1, keep, torch.arange(num_nodes, device=keep.device).expand_as(keep))
        parents = parents.gather(1, keep)
        parents = torch.where(parents < 0, -1, place.gather(1, parents.clamp(min=0)))
        tokens, log_probs = tokens.gather(1, keep), log_probs.gather(1, keep)
    return Proposal(tokens, parents, log_probs.float())


def grow(draft_vocab: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> TopKSearch | SampledSearch:
    """Start the search for trees of a shape over tokens ``[Vd]`` int64; ``generator`` as of :meth:`Drafter.propose`.

    A drafter adds depth after depth, and expands the frontier in between.

    Example:
        >>> type(grow(torch.arange(4), TreeShape(2, mode="sampled"))).__name__
        'SampledSearch'
    """
    return TopKSearch(draft_vocab, shape) if shape.mode == "topk" else SampledSearch(draft_vocab, shape, generator)


class TopKSearch:
    """Expands the likeliest nodes of each depth by joint probability, each by its likeliest tokens.

    There are ``width`` of each, or all tokens of a smaller draft vocabulary. The likeliest are kept.

    Example:
        >>> search = TopKSearch(torch.tensor([5, 7, 9]), TreeShape(depth=2, width=2, num_nodes=3))
        >>> search.add(torch.tensor([[[0.2, 0.7, 0.1]]]).log())
        >>> search.frontier()
        (tensor([[7, 5]]), tensor([[0, 0]]))
        >>> search.add(torch.tensor([[[0.1, 0.1, 0.8], [0.4, 0.5, 0.1]]]).log())
        >>> search.proposal().tokens, search.proposal().parents
        (tensor([[7, 5, 9]]), tensor([[-1, -1,  0]]))
    """

    def __init__(self, draft_vocab: Tensor, shape: TreeShape) -> None:
        self._draft_vocab, self._shape, self._children = draft_vocab, shape, min(shape.width, len(draft_vocab))
        # Of each depth: tokens, parents, log-probabilities given the path, and those of the path.
        self._depths: list[tuple[Tensor, ...]] = []
        # Candidates that the last frontier consists of, and their joint log-probabilities.
        self._expanded: tuple[Tensor, Tensor] | None = None
        self._before = 0  # candidates of all depths but the last

    def add(self, log_probs: Tensor) -> None:
        """Add a depth by the log-probabilities at the nodes of the frontier, at first the root, ``[b, w, Vd]``."""
        best, choice = log_probs.topk(self._children)
        parents, joint = torch.full_like(choice, -1), best
        if self._expanded is not None:
            self._before += self._depths[-1][0].shape[1]
            index, path = self._expanded
            parents, joint = index[:, :, None].expand_as(choice), path[:, :, None] + best
        self._depths.append(tuple(each.flatten(1) for each in (self._draft_vocab[choice], parents, best, joint)))

    def frontier(self) -> tuple[Tensor, Tensor]:
        """Return the nodes to expand next: their tokens, and their parents' places in the last frontier, ``[b, w]``."""
        tokens, _, _, joint = self._depths[-1]
        # A chain has one candidate, and the children of the root are all expanded: nothing to choose.
        if tokens.shape[1] <= self._shape.width:
            kept = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        else:
            joint, kept = joint.topk(self._shape.width)
            tokens = tokens.gather(1, kept)
        self._expanded = kept + self._before, joint
        return tokens, kept // self._children

    def proposal(self) -> Proposal:
        """Return the trees."""
        tokens, parents, log_probs, joint = (torch.cat(each, dim=1) for each in zip(*self._depths, strict=True))
        return best_first(tokens, parents, log_probs, joint, self._shape.num_nodes)


class SampledSearch:
    """Draws chains that part at the root.

    Which nodes there are does not depend on what was drawn: to leave one out for its token would change the law of the
    text under rejection.

    Example:
        >>> search = SampledSearch(torch.tensor([5, 7]), TreeShape(2, 2, mode="sampled_without_replacement"))
        >>> search.add(torch.tensor([[[0.5, 0.5]]]).log())
        >>> search.add(torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]).log())
        >>> search.proposal().tokens.sort().values, search.proposal().parents
        (tensor([[5, 5, 5, 7]]), tensor([[-1, -1,  0,  1]]))
    """

    def __init__(self, draft_vocab: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> None:
        self._draft_vocab, self._generator = draft_vocab, generator
        self._num_chains, self._replacement = shape.num_chains, shape.mode == "sampled"
        self._depths: list[tuple[Tensor, ...]] = []  # of each: tokens, log-probabilities, what they were drawn from

    def add(self, log_probs: Tensor) -> None:
        """Draw a node from each node of the frontier, at first from the root as many as there are chains."""
        q, draws = log_probs.exp(), 1 if self._depths else self._num_chains
        if not self._replacement and draws > int((q > 0).sum(-1).min()):
            raise ValueError(
                f"{draws} first tokens cannot all differ: the drafter has fewer with a probability above 0; take a "
                f"shape of a smaller width, or mode sampled"
            )
        choice = q.flatten(0, 1).multinomial(draws, self._replacement, generator=self._generator)
        choice = choice.view(*q.shape[:2], draws)
        drawn = (self._draft_vocab[choice].flatten(1), log_probs.gather(-1, choice).flatten(1))
        self._depths.append((*drawn, q.repeat_interleave(draws, dim=1)))

    def frontier(self) -> tuple[Tensor, Tensor]:
        """Return the last node of each chain, as :meth:`TopKSearch.frontier` does."""
        tokens = self._depths[-1][0]
        place = torch.arange(self._num_chains, device=tokens.device).expand_as(tokens)
        return tokens, torch.zeros_like(place) if len(self._depths) == 1 else place

    def proposal(self) -> Proposal:
        """Return the trees, with the distribution that each node was drawn from."""
        tokens, log_probs, q = (torch.cat(each, dim=1) for each in zip(*self._depths, strict=True))
        above = torch.arange(tokens.shape[1], device=tokens.device) - self._num_chains
        return Proposal(tokens, above.clamp(min=-1).expand_as(tokens), log_probs.float(), q)

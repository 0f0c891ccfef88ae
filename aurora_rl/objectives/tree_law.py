"""The nodes of recorded trees as draws from the drafter: their probabilities, now and as recorded, and their ratios."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from aurora_kernels.trees import sibling_ranks
from aurora_rl.envs.verification.rules import VerificationRule, rule_of_code
from aurora_rl.tree_index import TreeIndex

# A sum of recorded float32 probabilities loses less than this to rounding.
_RESOLVED = 1e-5


def before(context: Tensor, values: Tensor) -> Tensor:
    """Sum of ``values`` over the earlier siblings of every node; both are ``[M]``.

    Example:
        >>> before(torch.tensor([0, 0, 3, 0]), torch.tensor([1.0, 2.0, 5.0, 4.0]))
        tensor([0., 1., 0., 3.])
    """
    # Context by context, not as differences of a sum over the whole batch: in float32 those lose what stands apart.
    rank, out = sibling_ranks(context), torch.zeros_like(values)
    sums = values.new_zeros(int(context.max()) + 1 if len(context) else 0)
    for turn in range(int(rank.max()) + 1 if len(rank) else 0):
        here = (rank == turn).nonzero().flatten()
        out = out.index_copy(0, here, sums[context[here]])
        sums = sums.index_add(0, context[here], values[here])
    return out


def log_left(log_q: Tensor, context: Tensor, row: Tensor, distinct: Tensor) -> Tensor:
    """Return the log of the mass that the earlier siblings of every node left, ``[M]``; 0 if ``distinct`` is false.

    Summed over the tokens that are left: one less the sum of the others has neither value nor gradient where a token is
    all but sure.

    Args:
        log_q: Log-probabilities, ``[C, Vd]``, normalised.
        context: Row that each node was drawn from, ``[M]`` int64.
        row: Column of each node, ``[M]`` int64.
        distinct: Whether the columns of siblings differ, ``[M]`` bool, the same for all siblings.

    Example:
        >>> log_q = torch.tensor([[0.5, 0.3, 0.2]]).log()
        >>> log_left(log_q, torch.tensor([0, 0]), torch.tensor([0, 2]), torch.tensor([True, True])).exp()
        tensor([1.0000, 0.5000])
    """
    rank, out = sibling_ranks(context), torch.zeros_like(log_q[context, row])
    drawn = torch.zeros_like(log_q, dtype=torch.bool)
    for turn in range(int(rank[distinct].max()) + 1 if bool(distinct.any()) else 0):
        here = ((rank == turn) & distinct).nonzero().flatten()
        place = context[here]
        if turn:
            out = out.index_copy(0, here, log_q[place].masked_fill(drawn[place], -torch.inf).logsumexp(-1))
        drawn[place, row[here]] = True
    return out


class TreeLaw:
    """The nodes of a batch as draws from contexts.

    Attributes:
        trees: Index of the contexts.
        context: Row of ``p`` and ``q`` that each node was drawn from, ``[M]`` int64.
        row: Column of each node, ``[M]`` int64.
        p: Served distribution, ``[C, Vd]``.
        q: Distribution of the drafter, ``[C, Vd]``, with gradients.
        log_q: Log-probability of each draw given its earlier siblings, ``[M]``, with gradients.
        needs_q: Whether the rule of each node looks at ``q``, ``[M]`` bool.
        without: Whether the siblings of each node were drawn without replacement, ``[M]`` bool.
    """

    def __init__(
        self, trees: TreeIndex, context: Tensor, row: Tensor, p: Tensor, log_q: Tensor, rule: Tensor, *, without: Tensor
    ) -> None:
        self.trees, self.context, self.row, self.p, self.q = trees, context, row, p, log_q.exp()
        self._rule, self.without = rule, without
        self._log_left = log_left(log_q, context, row, without)
        self.log_q = log_q[context, row] - self._log_left
        self.needs_q = self.by_rule(lambda rule, here: torch.full_like(self.log_q[here], float(rule.needs_q))) > 0

    def condition_on_siblings(self, recorded: Tensor) -> Tensor:
        """Condition recorded log-probabilities given the path, ``[M]``, on the earlier siblings too."""
        left = 1 - before(self.context, recorded.exp())
        # Where float32 cannot say what was left, what is left now stands for it.
        now = self._log_left.detach().clamp(max=math.log(_RESOLVED))
        known = torch.where(left < _RESOLVED, now, left.clamp(min=_RESOLVED).log())
        return torch.where(self.without, recorded - known, recorded)

    def joint(self, ratio: Tensor) -> Tensor:
        """Return the product of a ratio over the path to each node and all earlier siblings along it, ``[M]``."""
        siblings = before(self.context, ratio.log()).exp()
        return self.trees.path_products(ratio * siblings)

    def by_rule(self, of: Callable[[VerificationRule, Tensor], Tensor]) -> Tensor:
        """Return a value of each node, ``[M]``: that of ``of``, called with each rule and the nodes served with it."""
        out = torch.zeros_like(self.q[self.context, self.row])
        for code in self._rule.unique().tolist():
            here = (self._rule == code).nonzero().flatten()
            out = out.index_copy(0, here, of(rule_of_code(code)(), here).to(out.dtype))
        return out

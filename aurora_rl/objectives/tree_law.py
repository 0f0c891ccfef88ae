"""The nodes of recorded trees as draws from the drafter: their probabilities, now and as recorded, and their ratios."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from aurora_kernels.rows import chunk_rows, log_softmax
from aurora_kernels.trees import sibling_ranks
from aurora_rl.envs.verification.rules import rule_of_code
from aurora_rl.objectives.chunks import by_chunks, rows_and_head
from aurora_rl.tree_index import TreeIndex

# A sum of recorded float32 probabilities loses less than this to rounding.
_RESOLVED = 1e-5


def before(context: Tensor, values: Tensor) -> Tensor:
    """Return the sum of ``values`` over the earlier siblings of every node; both are ``[M]``.

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
    """The nodes of a batch as draws from contexts, by both distributions at them.

    The distributions are read a few contexts at a time, and again in the backward pass.

    Args:
        trees: Index of the contexts.
        row: Column of each node, ``[M]`` int64.
        rule: Code of the rule of each node, ``[M]`` int64.
        logits: The drafter's logits at the contexts that nodes were drawn from, ``[C, Vd]``.
        served: Function that returns the served distribution at some of these contexts, ``[c, Vd]``.
        without: Whether the siblings of each node were drawn without replacement, ``[M]`` bool.
        alone: Whether to compute :attr:`alone`.

    Attributes:
        context: Context that each node was drawn from, among those that nodes were drawn from, ``[M]`` int64.
        log_q: Log-probability of each draw given its earlier siblings, ``[M]``, with gradients.
        acceptance: Chance that each node is accepted given the drawn tree, if its parent is, ``[M]``, with gradients.
        alone: Chance that each node would be accepted as the first of its siblings, ``[M]``; None if not asked for.
        below: Whether the drafter's probability of each node's token is below the served one, ``[M]`` bool.
        needs_q: Whether the rule of each node looks at the drafter's distribution, ``[M]`` bool.
    """

    def __init__(
        self,
        trees: TreeIndex,
        row: Tensor,
        rule: Tensor,
        *,
        logits: Tensor,
        served: Callable[[slice], Tensor],
        without: Tensor,
        alone: bool = False,
    ) -> None:
        self.trees, self.context, self.without = trees, trees.context, without
        needs_q = {code: rule_of_code(code).needs_q for code in rule.unique().tolist()}
        self.needs_q = torch.isin(rule, rule.new_tensor([code for code, needed in needs_q.items() if needed]))
        rank = sibling_ranks(self.context)
        states, head = rows_and_head(logits)

        def judge(states: Tensor, start: int, nodes: Tensor) -> tuple[Tensor, ...]:
            """Return what is asked of the nodes of a chunk of contexts, each as ``[m]``."""
            log_q, context, column = log_softmax(head(states)), self.context[nodes] - start, row[nodes]
            left = log_left(log_q, context, column, without[nodes])
            own, q = log_q[context, column], log_q.exp()
            # Last, for the backward pass, which does not get here if no rule looks at q.
            p = served(slice(start, start + len(states))).to(q.dtype)
            below = q.detach()[context, column] < p[context, column]
            found = own, left, _acceptance(rule[nodes], p, q, column, context), below
            if not alone:
                return found
            first = torch.zeros_like(own)
            with torch.no_grad():
                for turn in rank[nodes].unique().tolist():  # no two of them are siblings
                    here = (rank[nodes] == turn).nonzero().flatten()
                    first[here] = _acceptance(rule[nodes[here]], p, q, column[here], context[here])
            return *found, first

        # Siblings stay in their order. Every context has a node, and so has every chunk.
        size, order = chunk_rows(row.device, logits.shape[-1], len(states)), self.context.argsort(stable=True)
        nodes = order.split((self.context // size).bincount(minlength=1).tolist())
        chunks = zip(states.split(size), range(0, max(len(states), 1), size), nodes, strict=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        own, self._log_left, self.acceptance, self.below, *first = (each[place] for each in by_chunks(judge, chunks))
        self.log_q, self.alone = own - self._log_left, first[0] if first else None

    def condition_on_siblings(self, recorded: Tensor) -> Tensor:
        """Condition recorded log-probabilities given the path, ``[M]``, on the earlier siblings too."""
        left = 1 - before(self.context, recorded.exp())
        # Where float32 cannot say what was left, what is left now stands for it.
        now = self._log_left.detach().clamp(max=math.log(_RESOLVED))
        known = torch.where(left < _RESOLVED, now, left.clamp(min=_RESOLVED).log())
        return torch.where(self.without, recorded - known, recorded)

    def joint(self, ratio: Tensor) -> Tensor:
        """Return the product of a ratio over the path to each node and all earlier siblings along it, ``[M]``."""
        return self.trees.path_products(ratio * before(self.context, ratio.log()).exp())


def _acceptance(rule: Tensor, p: Tensor, q: Tensor, row: Tensor, context: Tensor) -> Tensor:
    """Return the acceptance of every node by the rule of its code, ``[m]``, see ``VerificationRule.acceptance``."""
    out = p.new_zeros(len(rule))
    for code in rule.unique().tolist():
        here = (rule == code).nonzero().flatten()
        chance = rule_of_code(code)().acceptance(p, q, row[here], context[here])
        out = out.index_copy(0, here, chance.to(out.dtype))
    return out

"""Expected length: the accepted length that sampled drafting would have on average, differentiated as it stands."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aurora_rl.envs.sampling import argmax
from aurora_rl.envs.verification import get_rule
from aurora_rl.objectives.contexts import (
    SAMPLING_KEYS,
    SPINE_KEYS,
    TREE_KEYS,
    path_products,
    subtree_sums,
    windows,
)
from aurora_rl.objectives.divergences import overlap
from aurora_rl.objectives.objective import Objective, Values, register_objective
from aurora_rl.objectives.target import context_rows, target_logits, target_rows
from aurora_rl.policies.drafter import Drafter, log_softmax
from aurora_rl.policies.recorded import RecordedTrees
from aurora_rl.trajectories import RULE_CODES


@register_objective("expected_length")
class ExpectedLengthLoss(Objective):
    """Minus the expected number of accepted drafts, without sampling.

    A context accepts a draft from ``q`` with chance ``α``: ``Σ min(p, q)`` under rejection, ``Σ p q`` under
    sample-and-match, ``q(argmax p)`` under greedy verification, with ``p`` as it was served. A path of contexts then
    has ``Σ over depths of the product of α`` accepted on average, given that what was accepted are the tokens of the
    path. For deterministic top-k drafting it is a relaxation: there a context accepts with ``p(argmax q)``, whose own
    expected length, which has no gradient, is the metric beside it.

    Args:
        drafter: its parameters learn.
        head: ``[V, H]``, the target's output head, frozen.
        rule: "greedy", "sample_and_match", "rejection", ...; None takes each request's own.
        contexts: "text" takes windows of the committed text, drafted from every position of the completion as the
            training-time test does. "trees" takes the recorded trees, on the drafter's own nodes; a tree counts by the
            mean over its root-to-leaf paths, each weighed by the target's probability of its tokens.
        steps: depths of a window of text; the trees have their own.
        weight: factor on the loss, see :class:`Objective`.
        reduction: see :class:`Objective`; positions are windows or trees, in one group.

    The metrics are "expected_length" and "top1_length", of a chain of the drafter's likeliest tokens.

    Raises:
        ValueError: ``steps`` < 1, an unknown rule, contexts or reduction.

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> from aurora_rl.trajectories import pack
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16)).double()
        >>> out = ExpectedLengthLoss(drafter, parts.head, steps=2)(pack([tiny_trajectory(drafter)]))
        >>> sorted(out.keys()), bool(out["loss_expected_length"] == -out["expected_length"])
        (['expected_length', 'loss_expected_length', 'top1_length'], True)
    """

    def __init__(
        self,
        drafter: Drafter,
        head: Tensor,
        *,
        rule: str | None = None,
        contexts: str = "text",
        steps: int = 5,
        weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        if rule is not None:
            get_rule(rule)
        if contexts not in ("text", "trees"):
            raise ValueError(f"expected_length's contexts must be 'text' or 'trees', got {contexts!r}")
        if steps < 1:
            raise ValueError(f"expected_length needs steps >= 1, got {steps}")
        super().__init__(drafter, head, weight=weight, reduction=reduction)
        self.rule, self.contexts, self.steps = rule, contexts, steps

    @property
    def reads(self) -> list[NestedKey]:
        """See :attr:`Objective.reads`."""
        served = [*SAMPLING_KEYS, self.tensor_keys.hidden, *([] if self.rule else [("sampling", "rule")])]
        if self.contexts == "text":
            return [*SPINE_KEYS, *served]
        return [*TREE_KEYS, *served, self.tensor_keys.node_hidden]

    @property
    def metrics(self) -> list[str]:
        """See :attr:`Objective.metrics`."""
        return ["expected_length", "top1_length"]

    def values(self, batch: TensorDictBase) -> Values:
        """See :meth:`Objective.values`."""
        length, top1, valid = self._text(batch) if self.contexts == "text" else self._trees(batch)
        metrics = {
            name: torch.where(valid, part, 0.0).sum() / valid.sum().clamp(min=1)
            for name, part in (("expected_length", length), ("top1_length", top1))
        }
        return Values(-length[None], length.new_ones(()), valid[None], metrics)

    def _text(self, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Of the window from every completion token: expected length, that of likeliest tokens, validity; ``[C]``."""
        unroll = self.drafter.unroll(batch, self.steps)
        count = batch["spine", "offset"].diff() - batch["spine", "prompt_length"]
        request = torch.repeat_interleave(count)
        rows = target_rows(batch, self.tensor_keys.hidden)
        log_p = self.served_log_probs(batch, rows, request, greedy=self.rule == "greedy")
        found = [self._acceptance(batch, log_p, log_softmax(logits), request) for logits in unroll.logits]
        relaxed, top1 = (
            windows(torch.where(unroll.valid, torch.stack(part), 0.0)).cumprod(0).sum(0)
            for part in zip(*found, strict=True)
        )
        return relaxed, top1, unroll.valid[0]

    def _trees(self, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Of every recorded tree, ``[R]``, likewise."""
        keys, trees = self.tensor_keys, RecordedTrees.of(batch)
        rounds, nodes = slice(trees.num_rounds), slice(trees.num_rounds, None)
        drawn_from = torch.zeros_like(trees.depth, dtype=torch.bool)
        drawn_from[trees.parent] = True
        context = (drawn_from.cumsum(0) - 1)[trees.parent]
        rows = context_rows(batch, trees, drawn_from, keys.hidden, keys.node_hidden)
        request = trees.request[drawn_from]
        log_q = log_softmax(self.drafter.context_logits(batch, drawn_from))
        log_p = self.served_log_probs(batch, rows, request, greedy=self.rule == "greedy")
        found = self._acceptance(batch, log_p, log_q, request)
        share = self._share_of_leaves(batch, trees, rows, context)
        relaxed, top1 = (
            # A node counts with the chance that all contexts before it accept, on the paths that lead through it.
            subtree_sums(trees, path_products(trees, part[context])[nodes] * share)[rounds]
            for part in found
        )
        return relaxed, top1, batch["rounds", "offset"].diff() > 0

    @torch.no_grad()
    def _share_of_leaves(
        self, batch: TensorDictBase, trees: RecordedTrees, rows: TensorDictBase, context: Tensor
    ) -> Tensor:
        """Share of its tree's root-to-leaf paths that leads through each node, by reach, ``[M]``."""
        log_p = log_softmax(target_logits(rows, self.head))[context, batch["nodes", "tokens"]]
        # In float64: the product of many small chances of a path must not vanish.
        reach = path_products(trees, log_p.double().exp())[trees.num_rounds :]
        leaf = torch.ones_like(trees.depth, dtype=torch.bool)
        leaf[trees.parent] = False
        below = subtree_sums(trees, torch.where(leaf[trees.num_rounds :], reach, 0.0))
        tree = torch.repeat_interleave(batch["rounds", "offset"].diff())
        return (below[trees.num_rounds :] / below[tree].clamp(min=torch.finfo(below.dtype).tiny)).to(log_p.dtype)

    def _acceptance(
        self, batch: TensorDictBase, log_p: Tensor, log_q: Tensor, request: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Chance that each context accepts a draft from ``q``, and its likeliest token; each ``[X]``."""
        p = log_p.exp().to(log_q.dtype)
        matched = torch.linalg.vecdot(p, log_q.exp())
        top1 = p.gather(-1, argmax(log_q)[:, None])[:, 0]
        if self.rule is not None:
            rejects = torch.full_like(request, get_rule(self.rule).needs_q, dtype=torch.bool)
        else:
            by_code = torch.tensor([get_rule(name).needs_q for name in RULE_CODES], device=request.device)
            rejects = by_code[batch["sampling", "rule"][request]]
        if not bool(rejects.any()):
            return matched, top1
        return torch.where(rejects, overlap(log_p.to(log_q.dtype), log_q), matched), top1

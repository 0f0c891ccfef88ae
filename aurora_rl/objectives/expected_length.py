"""Expected length: the accepted length that sampled drafting would have on average, differentiated as it stands."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from typing_extensions import override

from aurora_kernels import Target
from aurora_rl.envs.verification.rules import get_rule, require_token_wise, rule_of_code
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.comparison import compare
from aurora_rl.objectives.divergences import missed_probability, total_variation
from aurora_rl.objectives.objective import SAMPLING_KEYS, Objective, Values
from aurora_rl.objectives.registry import register_objective
from aurora_rl.objectives.target_rows import context_rows, target_rows, token_log_probs
from aurora_rl.objectives.windows import by_window, completion_tokens, unroll_text
from aurora_rl.policies.drafter import Drafter, draft_rows
from aurora_rl.tree_index import SEQUENCE_KEYS, TREE_KEYS, TreeIndex, completion_columns


@register_objective("expected_length")
class ExpectedLengthLoss(Objective):
    """Minus the expected number of accepted drafts, without sampling.

    A context accepts a draft from ``q`` with probability ``α``: ``Σ min(p, q)`` under rejection, ``Σ p q`` under
    sample-and-match, ``q(argmax p)`` under greedy verification, with ``p`` as it was served. A path of contexts then
    has ``Σ over depths of the product of α`` accepted on average, given that what was accepted are the tokens of the
    path. For deterministic top-k drafting it is a relaxation; a metric reports the exact value.

    Args:
        drafter: Drafter whose parameters learn.
        head: The target's output head, frozen; a weight ``[V, H]`` stands for a plain one.
        rule: Verification rule: "greedy", "sample_and_match", "rejection", ...; None takes each request's own.
        contexts: Contexts to learn at: "text" takes windows of the committed text, drafted from every position of the
            completion as the training-time test does. "trees" takes the recorded trees, on the drafter's own nodes. A
            tree's value is the mean over its root-to-leaf paths, weighted by the target's probability of their tokens.
            That probability is at temperature 1 for every request, so that paths of greedy requests keep a weight.
        steps: Depths of a window of text; the trees have their own.
        weight: Factor on the loss, see :class:`Objective`.
        reduction: See :class:`Objective`; positions are windows or trees, in one group.

    The metrics are "expected_length", and "top1_length" (of text: likeliest tokens from every anchor before the first
    that is not the text's) or "accepted_length" (of trees).

    Raises:
        ValueError: ``steps`` < 1, an unknown rule, contexts or reduction; or a rule that accepts no single nodes, given
            or of a batch.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, head, batch = tiny_batch()
        >>> out = ExpectedLengthLoss(drafter, head, steps=2)(batch)
        >>> sorted(out.keys()), bool(out["loss_expected_length"] == -out["expected_length"])
        (['expected_length', 'loss_expected_length', 'top1_length'], True)
    """

    def __init__(
        self,
        drafter: Drafter,
        head: TargetHead | Tensor,
        *,
        rule: str | None = None,
        contexts: str = "text",
        steps: int = 5,
        weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        if rule is not None:
            require_token_wise(get_rule(rule), f"objective {self.name!r}")
        if contexts not in ("text", "trees"):
            raise ValueError(f"expected_length's contexts must be 'text' or 'trees', got {contexts!r}")
        if steps < 1:
            raise ValueError(f"expected_length needs steps >= 1, got {steps}")
        super().__init__(drafter, head, weight=weight, reduction=reduction)
        self.rule, self.contexts, self.steps = rule, contexts, steps

    @property
    @override
    def reads(self) -> list[NestedKey]:
        served = [self.tensor_keys.hidden, *([] if self.rule else [("sampling", "rule")])]
        if self.rule != "greedy":
            served += SAMPLING_KEYS
        if self.contexts == "text":
            return [*SEQUENCE_KEYS, *served]
        return [*TREE_KEYS, *served, self.tensor_keys.node_hidden, self.tensor_keys.accepted]

    @property
    @override
    def metrics(self) -> Sequence[str]:
        return "expected_length", "top1_length" if self.contexts == "text" else "accepted_length"

    @override
    def values(self, batch: TensorDictBase) -> Values:
        length, true, valid = self._text(batch) if self.contexts == "text" else self._trees(batch)
        metrics = {name: self.mean(part, valid) for name, part in zip(self.metrics, (length, true), strict=False)}
        return Values(-length[None], length.new_ones(()), valid[None], metrics)

    def _text(self, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Return expected length, true length and validity, ``[C]`` each, of the window from every completion token."""
        request = completion_columns(batch)[0]
        unroll, _ = unroll_text(self.drafter, batch, self.steps)  # nothing is accepted past the text
        rows = target_rows(batch, self.tensor_keys.hidden)
        law = self.served_target(batch, rows, request, greedy=self.rule == "greedy")
        row = draft_rows(self.drafter.draft_vocab, completion_tokens(batch))
        chance, right = self._acceptance(batch, law, unroll.logits, request, unroll.valid, row)
        relaxed, top1 = (by_window(part).cumprod(0).sum(0) for part in (chance, right.to(chance.dtype)))
        return relaxed, top1, unroll.valid[0]

    def _trees(self, batch: TensorDictBase) -> tuple[Tensor, Tensor, Tensor]:
        """Return expected length, accepted nodes and validity, ``[R]`` each, of every recorded tree."""
        self.expect_nodes(batch)
        keys, trees = self.tensor_keys, TreeIndex.of(batch)
        rounds = slice(trees.num_rounds)
        drawn_from, context = trees.drawn_from, trees.context
        rows = context_rows(batch, trees, drawn_from, keys.hidden, keys.node_hidden)
        request = trees.request[drawn_from]
        logits = self.drafter.context_logits(batch, trees, drawn_from)
        law = self.served_target(batch, rows, request, greedy=self.rule == "greedy")
        # Where the drafter predicts nothing (below its depth, before the first pair) nothing is accepted of it.
        predicted = ((trees.root >= 0) & (trees.depth < self.drafter.max_depth))[drawn_from]
        (chance,), _ = self._acceptance(batch, law, [logits], request, predicted[None])
        # A node counts with the probability that all contexts before it accept, on the paths that lead through it.
        passed = trees.path_products(chance[context]) * self._share_of_leaves(batch, trees, rows, context)
        relaxed = trees.subtree_sums(passed)[rounds]
        accepted = trees.subtree_sums(batch[keys.accepted].to(relaxed.dtype))[rounds]
        return relaxed, accepted, batch["rounds", "offset"].diff() > 0

    @torch.no_grad()
    def _share_of_leaves(
        self, batch: TensorDictBase, trees: TreeIndex, rows: TensorDictBase, context: Tensor
    ) -> Tensor:
        """Return the share of its tree's root-to-leaf paths that leads through each node, by reach, ``[M]``."""
        log_p = token_log_probs(rows, self.head, context, batch["nodes", "tokens"])
        # In float64: the product of many small probabilities of a path must not vanish.
        reach = trees.path_products(log_p.double().exp())
        leaf = torch.ones_like(trees.depth, dtype=torch.bool)
        leaf[trees.parent] = False
        below = trees.subtree_sums(torch.where(leaf[trees.num_rounds :], reach, 0.0))
        tree = torch.repeat_interleave(batch["rounds", "offset"].diff())
        return (below[trees.num_rounds :] / below[tree].clamp(min=torch.finfo(below.dtype).tiny)).to(log_p.dtype)

    def _acceptance(
        self,
        batch: TensorDictBase,
        law: Target,
        logits: Sequence[Tensor],
        request: Tensor,
        valid: Tensor,
        row: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the probability that each context accepts a draft from ``q``, and whether ``row`` is its likeliest.

        Both are ``[J, X]`` and 0 where ``valid`` ``[J, X]`` is false; ``logits`` are ``J`` of ``[X, Vd]``. ``row``
        ``[X]`` int64 is a draft row, or −1; None stands for that of the served distribution's likeliest token.
        """
        if self.rule is not None:
            rejects = torch.full_like(request, get_rule(self.rule).needs_q, dtype=torch.bool)
        else:
            codes = batch["sampling", "rule"]
            rules = [rule_of_code(code) for code in codes.tolist()]
            for each in set(rules):
                require_token_wise(each, f"objective {self.name!r}")
            rejects = torch.tensor([each.needs_q for each in rules], device=codes.device)[request]
        dtype = torch.promote_types(next(self.drafter.parameters()).dtype, torch.float32)
        chance, right = torch.zeros_like(valid, dtype=dtype), torch.zeros_like(valid)
        for divergence, here in ((missed_probability, ~rejects), (total_variation, rejects)):
            if bool(here.any()):
                asked = valid & here
                rejected, agrees = compare(
                    logits, law, divergence,
                    draft_vocab=None, renormalize=False, row_weights=asked, choices=row,
                )  # fmt: skip
                chance, right = torch.where(asked, 1 - rejected, chance), right | (agrees & asked)
        return chance, right

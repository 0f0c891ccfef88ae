"""Imitation: the drafter learns the target's distribution at accepted contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDictBase
from torch import Tensor
from typing_extensions import override

from aurora_kernels import Target
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.comparison import row_log_probs
from aurora_rl.objectives.distillation import DistillationObjective
from aurora_rl.objectives.divergences import Divergence, get_divergence, wants_renormalized
from aurora_rl.objectives.objective import Values
from aurora_rl.objectives.registry import register_objective
from aurora_rl.objectives.target_rows import target_rows
from aurora_rl.objectives.windows import by_window, completion_tokens, unroll_text, with_rows
from aurora_rl.policies.drafter import Drafter, Unroll, draft_rows
from aurora_rl.tree_index import completion_columns

# Share of certainty that every position is granted in D-PACE, so that one hopeless token does not switch off the rest.
_GRANTED = 0.5


def expected_length_weights(log_q: Tensor, valid: Tensor) -> Tensor:
    """Return weights by which a window's cross entropies become a surrogate of its expected accepted length (D-PACE).

    Let ``c_i`` be ``(1 + q_i) / 2``, with ``q_i`` the drafter's probability of the window's token ``i``. The weight of
    step ``j`` is ``sum over m >= j of the product over i <= m of c_i``: how many of the tokens hang on this one.

    Source: D-PACE (arXiv 2605.18810).

    Args:
        log_q: The drafter's log-probability of completion token ``c`` at depth ``j + 1``, ``[J, C]``, see ``Unroll``.
        valid: Positions that count, ``[J, C]`` bool; the weights ``[J, C]`` are 0 elsewhere, and detached.

    Example:
        >>> sure = torch.zeros(2, 2)  # two tokens that the drafter is certain of, as one window and a cut one
        >>> expected_length_weights(sure, torch.tensor([[True, True], [False, True]]))
        tensor([[2., 1.],
                [0., 1.]])
    """
    steps, count = log_q.shape
    share = torch.where(valid, _GRANTED + (1 - _GRANTED) * log_q.detach().exp(), 0.0)
    reach = by_window(share).cumprod(0)
    rest = reach.flip(0).cumsum(0).flip(0)
    weights = torch.stack([F.pad(rest[j, : count - min(j, count)], (min(j, count), 0)) for j in range(steps)])
    return torch.where(valid, weights, 0.0)


@register_objective("imitation")
class ImitationLoss(DistillationObjective):
    """A divergence to the target at accepted contexts, unrolled as serving drafts.

    Li et al. 2025 (EAGLE-3, arXiv 2503.01840): the training-time test feeds the drafter its own hidden states.

    Args:
        drafter: Drafter whose parameters learn.
        head: The target's output head, frozen; a weight ``[V, H]`` stands for a plain one.
        divergence: Divergence, see :func:`get_divergence`.
        renormalize: Whether the target's distribution is renormalised over the draft vocabulary. Otherwise it keeps its
            share of the whole vocabulary, as overlaps need to mean acceptance, and the whole head is multiplied. None
            asks the divergence: false for probabilities of acceptance (total variation, the two overlaps and the missed
            probability), true for the others.
        target: Distribution to imitate, "model" or "served", see :class:`DistillationObjective`. With "served",
            positions where the draft vocabulary has none of the mass do not count.
        steps: Depths ``J`` to unroll; None takes the drafter's ``unroll_depth``.
        decay: Weight of each further step.
        weighting: Weights of positions: "decay", or "expected_length" for :func:`expected_length_weights` in place of
            powers of ``decay``.
        regression: Weight of a smooth-L1 distance between what the draft head reads and what the target's head reads
            (EAGLE, arXiv 2401.15077); 0 for none.
        weight: Factor on the loss, see :class:`Objective`.
        reduction: See :class:`Objective`; positions are the completion tokens, groups the steps.

    The metric is "agreement" ``[J]``: the share of positions where the likeliest tokens agree, an estimate of greedy
    acceptance.

    Raises:
        ValueError: ``steps`` is below 1, ``decay`` outside (0, 1], or ``regression`` negative or infinite; or
            divergence, target, weighting or reduction is unknown. At the first batch: ``regression`` is set, but the
            drafter's unroll has no states, or the target's outputs have no hidden states.

    Example:
        >>> from aurora_rl.testing import tiny_batch
        >>> drafter, head, batch = tiny_batch()
        >>> sorted(ImitationLoss(drafter, head, steps=2)(batch).keys())
        ['agreement', 'loss_imitation']
    """

    def __init__(
        self,
        drafter: Drafter,
        head: TargetHead | Tensor,
        *,
        divergence: str | Mapping[str, Any] | Divergence = "forward_kl",
        renormalize: bool | None = None,
        target: str = "model",
        steps: int | None = None,
        decay: float = 0.8,
        weighting: str = "decay",
        regression: float = 0.0,
        weight: float = 1.0,
        reduction: str = "mean",
    ) -> None:
        if steps is not None and steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must lie in (0, 1], got {decay}")
        if weighting not in ("decay", "expected_length"):
            raise ValueError(f"weighting must be 'decay' or 'expected_length', got {weighting!r}")
        if not 0 <= regression < math.inf:
            raise ValueError(f"regression must be finite and not negative, got {regression}")
        divergence = get_divergence(divergence)
        if renormalize is None:
            renormalize = wants_renormalized(divergence)
        super().__init__(drafter, head, renormalize=renormalize, target=target, weight=weight, reduction=reduction)
        self.divergence = divergence
        self._steps, self.decay, self.weighting, self.regression = steps, decay, weighting, regression

    @property
    def steps(self) -> int:
        """Depths to unroll."""
        return self._steps or self.drafter.unroll_depth

    @override
    def values(self, batch: TensorDictBase) -> Values:
        unroll, lacks = unroll_text(self.drafter, batch, self.steps)
        rows = target_rows(batch, self.tensor_keys.hidden)
        law, covered = self.target_law(batch, rows, completion_columns(batch)[0])
        reached, weight = unroll.valid & covered, self.position_weights(batch, unroll, law)
        self._check_weight(weight, reached)
        valid = with_rows(reached, lacks)
        rows_weight = torch.where(reached, weight.detach(), 0.0)
        if self.reduction == "mean":
            rows_weight = rows_weight / self.count(valid)[: len(reached), None].clamp(min=1)
        value, agrees = self.compare(unroll.logits, law, rows_weight)
        if self.regression:
            value = value + self.regression * _distance(unroll, rows)
        value, weight, agrees = (with_rows(each, lacks) for each in (value, weight.expand_as(value), agrees))
        return Values(value, weight, valid, {"agreement": self.mean(agrees, valid)})

    def position_weights(self, batch: TensorDictBase, unroll: Unroll, law: Target) -> Tensor:
        """Return the weight of each position, as ``weighting`` says; a subclass may choose its own.

        Weights broadcast to ``[J, C]`` and are detached; entries at invalid positions do not matter. ``law`` is the
        target's distribution, of which :meth:`log_probs` returns all.
        """
        if self.weighting == "expected_length":
            row = draft_rows(self.drafter.draft_vocab, completion_tokens(batch))
            log_q = torch.stack([row_log_probs(logits, row) for logits in unroll.logits])
            return expected_length_weights(log_q, unroll.valid)
        return self.decay ** torch.arange(len(unroll.logits), dtype=torch.float32, device=unroll.valid.device)[:, None]


def _distance(unroll: Unroll, rows: TensorDictBase) -> Tensor:
    """Compute the smooth-L1 distance of each step's states from the target's, averaged over their width, ``[J, C]``."""
    if unroll.states is None:
        raise ValueError("objective 'imitation': regression needs a drafter whose unroll has states; set regression=0")
    if "hidden" not in rows.keys():
        raise ValueError(
            "objective 'imitation': regression needs the target's hidden states, and the batch has its likeliest "
            "tokens in their place; set regression=0, or serve with an engine that records 'hidden'"
        )
    hidden = rows["hidden"]
    return torch.stack([F.smooth_l1_loss(s, hidden.to(s.dtype), reduction="none").mean(-1) for s in unroll.states])

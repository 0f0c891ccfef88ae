"""What imitation, discard sampling and objectives from functions share: the distribution that the drafter is taught."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from typing_extensions import override

from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.objective import SAMPLING_KEYS, Objective
from aurora_rl.objectives.target_rows import target_logits
from aurora_rl.policies.drafter import Drafter, log_softmax
from aurora_rl.tree_index import SEQUENCE_KEYS


class DistillationObjective(Objective):
    """An objective that compares the drafter's distribution with the target's, by default along the committed text.

    Args:
        drafter: Drafter whose parameters learn.
        head: The target's output head, frozen; a weight ``[V, H]`` stands for a plain one.
        renormalize: Whether the target's distribution is renormalised over the draft vocabulary.
        target: "model" for the target's distribution at temperature 1; "served" for that of each request, after its
            temperature, top-k and top-p (a point mass if it was decoded greedily).
        weight: Factor on the loss.
        reduction: Reduction over the positions: "mean", "sum" or "none".

    Raises:
        ValueError: An unknown target.
    """

    metrics: Sequence[str] = ("agreement",)

    def __init__(
        self,
        drafter: Drafter,
        head: TargetHead | Tensor,
        *,
        renormalize: bool,
        target: str,
        weight: float,
        reduction: str,
    ) -> None:
        if target not in ("model", "served"):
            raise ValueError(f"target must be 'model' or 'served', got {target!r}")
        super().__init__(drafter, head, weight=weight, reduction=reduction)
        self.renormalize, self.served = renormalize, target == "served"

    @property
    @override
    def reads(self) -> list[NestedKey]:
        return [*SEQUENCE_KEYS, self.tensor_keys.hidden, *(SAMPLING_KEYS if self.served else [])]

    @torch.no_grad()
    def target_law(self, batch: TensorDictBase, rows: TensorDictBase, request: Tensor) -> tuple[Tensor, Tensor]:
        """Return the distribution that the drafter is compared with.

        Args:
            batch: Packed trajectories.
            rows: The target's outputs, ``[X]``, see ``target_rows``.
            request: Request of each row, ``[X]`` int64.

        Returns:
            Log-probabilities ``[X, Vd]``; and ``[X]`` bool, whether the draft vocabulary has any of the mass. Rows
            without are uniform.
        """
        if not self.served:
            log_p = self.target_log_probs(rows, renormalize=self.renormalize)
            return log_p, torch.ones(len(log_p), dtype=torch.bool, device=log_p.device)
        log_p = self.served_log_probs(batch, rows, request)
        covered = log_p.amax(-1) != -torch.inf  # what is not a number is to show in the loss
        log_p = log_p.masked_fill(~covered[:, None], -math.log(log_p.shape[-1]))
        return log_softmax(log_p) if self.renormalize else log_p, covered

    @torch.no_grad()
    def target_log_probs(self, rows: TensorDictBase, *, renormalize: bool) -> Tensor:
        """Return the target's log-probabilities at temperature 1 on the draft vocabulary, ``[X, Vd]``.

        ``rows`` are of ``target_rows``. Unless renormalised, they sum to the mass that the draft vocabulary covers.
        """
        vocab = self.drafter.draft_vocab
        if renormalize:
            return self._as_drafted(log_softmax(target_logits(rows, self.head, vocab)))
        return self._as_drafted(log_softmax(target_logits(rows, self.head))[:, vocab])

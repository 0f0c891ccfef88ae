"""Base of imitation, discard sampling and objectives from functions: the distribution that the drafter is taught."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from typing_extensions import override

from aurora_kernels import Target
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives.comparison import all_log_probs, compare
from aurora_rl.objectives.divergences import Divergence
from aurora_rl.objectives.objective import SAMPLING_KEYS, Objective
from aurora_rl.objectives.target_rows import row_target
from aurora_rl.policies.drafter import Drafter
from aurora_rl.tree_index import SEQUENCE_KEYS


class DistillationObjective(Objective):
    """An objective that compares the drafter's distribution with the target's, by default along the committed text.

    Arguments that are not named here are those of :class:`Objective`.

    Args:
        renormalize: Whether the target's distribution is renormalised over the draft vocabulary.
        target: "model" for the target's distribution at temperature 1. "served" for that of each request, after its
            temperature, min-p, top-k and top-p; it is a point mass if the request was decoded greedily.

    Raises:
        ValueError: An unknown target.
    """

    metrics: Sequence[str] = ("agreement",)
    divergence: Divergence

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
    def target_law(self, batch: TensorDictBase, rows: TensorDictBase, request: Tensor) -> tuple[Target, Tensor]:
        """Return the distribution that the drafter is compared with.

        Args:
            batch: Packed trajectories.
            rows: The target's outputs, ``[X]``, see ``target_rows``.
            request: Request of each row, ``[X]`` int64.

        Returns:
            The distribution at the rows, for :meth:`compare`; and ``[X]`` bool, whether the draft vocabulary has any of
            the mass. Rows without are uniform.
        """
        if not self.served:
            return row_target(rows, self.head), torch.ones_like(request, dtype=torch.bool)
        law = self.served_target(batch, rows, request, fill=True)
        return law, law.covered()

    def compare(
        self, logits: Sequence[Tensor], law: Target, row_weights: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the divergence and the agreement at every row, ``[J, X]`` each, see ``comparison.compare``.

        Args:
            logits: The drafter's logits, ``J`` tensors ``[X, Vd]``.
            law: Distribution of :meth:`target_law`.
            row_weights: Gradient that the values will receive, up to a factor, ``[J, X]``.
        """
        return compare(
            logits,
            law,
            self.divergence,
            draft_vocab=self._columns,
            renormalize=self.renormalize,
            row_weights=row_weights,
        )

    def log_probs(self, law: Target) -> Tensor:
        """Return a distribution of :meth:`target_law` on the draft vocabulary, ``[X, Vd]``, as ``renormalize`` says."""
        log_p = all_log_probs(law, self._columns, renormalize=self.renormalize)
        return log_p.to(torch.promote_types(next(self.drafter.parameters()).dtype, torch.float32))

    @property
    def _columns(self) -> Tensor | None:
        """Tokens to read of a distribution of :meth:`target_law`: the served one has the draft vocabulary's alone."""
        return None if self.served else self.drafter.draft_vocab

"""Imitation: the drafter learns the target's distribution at accepted contexts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor
from torchrl.objectives import LossModule

from aurora_rl.objectives.divergences import DIVERGENCES, Divergence, forward_kl
from aurora_rl.policies.drafter import Drafter, Unroll, log_softmax


@dataclass(frozen=True, slots=True)
class ImitationValues:
    """Per-position values of the imitation objective.

    Attributes:
        divergence: ``[J, C]`` nats, at each unroll step and completion token.
        agreement: ``[J, C]`` bool, whether the target's likeliest token is the drafter's too.
    """

    divergence: Tensor
    agreement: Tensor


def imitation(unroll: Unroll, log_p: Tensor, divergence: Divergence = forward_kl) -> ImitationValues:
    """A divergence to the target at every step of a training-time-test unroll.

    Args:
        unroll: the drafter's predictions, see ``Drafter.unroll``.
        log_p: ``[C, Vd]``, the target's log-probabilities at the rows of the draft vocabulary.
        divergence: of log-probabilities, see ``aurora_rl.objectives.divergences``.
    """
    best = log_p.max(-1).indices[:, None]
    with torch.no_grad():
        # Whether the target's choice is a likeliest token of the drafter: its argmax would take several times longer.
        agreement = [logits.gather(1, best)[:, 0] >= logits.amax(-1) for logits in unroll.logits]
    return ImitationValues(
        divergence=torch.stack([divergence(log_p, log_softmax(logits)) for logits in unroll.logits]),
        agreement=torch.stack(agreement),
    )


class ImitationLoss(LossModule):
    """A divergence to the target at accepted contexts, unrolled as serving drafts.

    Li et al. 2025 (EAGLE-3, arXiv 2503.01840): the training-time test feeds the drafter its own hidden states.
    Step ``j`` weighs ``decay ** j``.

    Args:
        drafter: its parameters learn.
        head: ``[V, H]``, the target's output head, frozen.
        divergence: a name of ``aurora_rl.objectives.divergences.DIVERGENCES``, or such a function.
        renormalize: whether the target's distribution is renormalised over the draft vocabulary. Otherwise it keeps its
            share of the whole vocabulary, as overlaps need to mean acceptance, and the whole head is multiplied.
        steps: ``J``, depths to unroll.
        decay: weight of each further step.
        reduction: "mean" over positions, "sum" or "none" (``[J, C]`` weighted values, zero where invalid).

    Forward reads packed trajectories (``aurora_rl.trajectories.pack``) and returns "loss_imitation" and, detached,
    "agreement" ``[J]``: the share of positions where the likeliest tokens agree, an estimate of greedy acceptance.

    Raises:
        ValueError: ``steps`` < 1, ``decay`` outside (0, 1], an unknown divergence or reduction.

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> from aurora_rl.trajectories import pack
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16)).double()
        >>> loss = ImitationLoss(drafter, parts.head, steps=2)
        >>> sorted(loss(pack([tiny_trajectory(drafter)])).keys())
        ['agreement', 'loss_imitation']
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that can be renamed by ``set_keys``."""

        hidden: NestedKey = ("spine", "hidden")

    default_keys = _AcceptedKeys
    tensor_keys: _AcceptedKeys
    drafter: Drafter

    def __init__(
        self,
        drafter: Drafter,
        head: Tensor,
        *,
        divergence: str | Divergence = "forward_kl",
        renormalize: bool = True,
        steps: int = 3,
        decay: float = 0.8,
        reduction: str = "mean",
    ) -> None:
        if steps < 1 or not 0 < decay <= 1:
            raise ValueError(f"imitation needs steps >= 1 and 0 < decay <= 1, got steps {steps}, decay {decay}")
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
        if isinstance(divergence, str):
            if divergence not in DIVERGENCES:
                raise ValueError(f"unknown divergence {divergence!r}; there are {', '.join(sorted(DIVERGENCES))}")
            divergence = DIVERGENCES[divergence]
        super().__init__()
        self.divergence, self.renormalize = divergence, renormalize
        self.drafter, self.steps, self.decay, self.reduction = drafter, steps, decay, reduction
        self.register_buffer("head", head, persistent=False)
        self._set_in_keys()

    def _set_in_keys(self) -> None:
        self._in_keys = [
            ("spine", "tokens"),
            ("spine", "offset"),
            ("spine", "prompt_length"),
            ("spine", "features"),
            self.tensor_keys.hidden,
        ]

    def _forward_value_estimator_keys(self, **kwargs: object) -> None:
        self._set_in_keys()

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries that forward reads."""
        return self._in_keys

    @in_keys.setter
    def in_keys(self, keys: list[NestedKey]) -> None:
        self._in_keys = keys

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries that forward returns."""
        return ["loss_imitation", "agreement"]

    @torch.no_grad()
    def _target(self, hidden: Tensor) -> Tensor:
        """The target's log-probabilities ``[C, Vd]`` where the output head reads ``hidden`` ``[C, H]``."""
        hidden, vocab = hidden.to(self.head.dtype), self.drafter.draft_vocab
        if self.renormalize:
            return log_softmax(hidden @ self.head[vocab].T)
        return log_softmax(hidden @ self.head.T)[:, vocab]

    def forward(self, tensordict: TensorDictBase) -> TensorDict:
        """Loss and metrics of a packed batch."""
        unroll = self.drafter.unroll(tensordict, self.steps)
        log_p = self._target(tensordict[self.tensor_keys.hidden])
        values = imitation(unroll, log_p, self.divergence)
        steps = len(unroll.logits)
        weight = self.decay ** torch.arange(steps, device=log_p.device)[:, None] * unroll.valid
        loss = values.divergence * weight
        if self.reduction == "mean":
            # Each step is averaged over its own positions, so that a batch of short completions is not dominated by
            # the first step.
            loss = (loss.sum(1) / unroll.valid.sum(1).clamp(min=1)).sum()
        elif self.reduction == "sum":
            loss = loss.sum()
        agreement = (values.agreement & unroll.valid).sum(1) / unroll.valid.sum(1).clamp(min=1)
        return TensorDict({"loss_imitation": loss, "agreement": agreement}, batch_size=[])

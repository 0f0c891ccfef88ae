"""The poorer form of a trajectory that engines without hidden states give."""

from __future__ import annotations

from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_rl.policies.drafter import log_softmax
from aurora_rl.trajectories import TOPK_ENTRIES


def topk_form(trajectory: TensorDictBase, head: Tensor, k: int) -> TensorDict:
    """The trajectory with the target's likeliest tokens in place of its hidden states.

    Args:
        trajectory: with ("spine", "hidden") and ("nodes", "hidden"); stays as it is.
        head: ``[V, H]``, the target's output head.
        k: ``K``, tokens of a row, at most ``V``.

    Returns:
        Log-probabilities are in float64 for a head in float64, and in float32 otherwise.

    Example:
        >>> import torch
        >>> from aurora_rl.policies import MedusaDrafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(16)).double()
        >>> topk_form(tiny_trajectory(drafter), parts.head, 4)["spine", "topk_ids"].shape
        torch.Size([12, 4])
    """
    out = trajectory.clone()
    for part in ("spine", "nodes"):
        log_p = log_softmax(out[part].pop("hidden").to(head.dtype) @ head.T)
        best, ids = log_p.topk(k, dim=-1)
        # Summed over the others: one less the sum of the best would lose a small tail to rounding.
        tail = log_p.scatter(1, ids, -float("inf")).logsumexp(-1)
        for name, value in zip(TOPK_ENTRIES, (ids, best, tail), strict=True):
            out[part, name] = value
    return out

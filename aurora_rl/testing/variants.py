"""The same trajectory in other forms: the poorer one that engines without hidden states give, and siblings reversed."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from aurora_kernels.rows import log_softmax
from aurora_rl.models.target_head import TargetHead
from aurora_rl.trajectories import TOPK_ENTRIES


def topk_form(trajectory: TensorDictBase, head: TargetHead | Tensor, k: int) -> TensorDict:
    """Replace a trajectory's hidden states by the target's likeliest tokens.

    Args:
        trajectory: Trajectory with ("sequence", "hidden") and ("nodes", "hidden"); stays as it is.
        head: The target's output head; a weight ``[V, H]`` stands for a plain one.
        k: Tokens ``K`` of a row, at most ``V``.

    Returns:
        Log-probabilities are in float64 for a head in float64, and in float32 otherwise.

    Example:
        >>> import torch
        >>> from aurora_rl.policies import MedusaDrafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(16)).double()
        >>> topk_form(tiny_trajectory(drafter), parts.head, 4)["sequence", "topk_ids"].shape
        torch.Size([12, 4])
    """
    out, head = trajectory.clone(), TargetHead.like(head)
    for part in ("sequence", "nodes"):
        log_p = log_softmax(head(out[part].pop("hidden").to(head.weight.dtype)))
        best, ids = log_p.topk(k, dim=-1)
        # Summed over the others: one less the sum of the best would lose a small tail to rounding.
        tail = log_p.scatter(1, ids, -float("inf")).logsumexp(-1)
        for name, value in zip(TOPK_ENTRIES, (ids, best, tail), strict=True):
            out[part, name] = value
    return out


def siblings_reversed(trajectory: TensorDict) -> TensorDict:
    """Return the same trees with siblings in reverse order."""
    out, offset = trajectory.clone(), trajectory["rounds", "offset"].tolist()
    for first, last in zip(offset, offset[1:], strict=False):
        parents, count = trajectory["nodes", "parents"][first:last], last - first
        # Nodes counted from the end keep children after parents only depth by depth: visit them in that order.
        order = torch.tensor(_reversed_depth_first(parents), dtype=torch.int64)
        place = torch.full((count + 1,), -1)
        place[order] = torch.arange(count)
        for key in ("tokens", "log_probs", "accepted", "hidden"):
            out["nodes", key][first:last] = trajectory["nodes", key][first:last][order]
        out["nodes", "parents"][first:last] = place[parents[order]]
    return out


def _reversed_depth_first(parents: Tensor, node: int = -1) -> list[int]:
    """Return the nodes below a node, depth-first, in which children come in reverse."""
    children = (parents == node).nonzero().flatten().tolist()
    return [below for child in reversed(children) for below in (child, *_reversed_depth_first(parents, child))]

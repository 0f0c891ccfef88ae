"""Divergences between the target's distribution and the drafter's: plain functions of logits, one value per position.

Legend: ``p`` target, ``q`` drafter, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(target_logits: Tensor, draft_logits: Tensor) -> Tensor:
    """KL(p || q) in nats, both renormalised over the draft vocabulary.

    Its gradient in the draft logits is ``q − p``.

    Args:
        target_logits: ``[..., Vd]``, the target's logits at the rows of the draft vocabulary; no gradient flows.
        draft_logits: ``[..., Vd]``.

    Returns:
        ``[...]``, float32 or wider.

    Example:
        >>> forward_kl(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 0.0])).item()
        0.0
    """
    log_p = log_softmax(target_logits.detach())
    return (log_p.exp() * (log_p - log_softmax(draft_logits))).sum(-1)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension in float32, or in float64 where that is what comes in."""
    return logits.log_softmax(-1, dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)

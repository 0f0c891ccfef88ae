"""Divergences between the target's distribution and the drafter's: plain functions of log-probabilities.

Legend: ``p`` target, ``q`` drafter, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats. Its gradient in the logits of ``q`` is ``q − p``.

    Args:
        log_p: ``[..., Vd]``, normalised over the last dimension; no gradient flows.
        log_q: ``[..., Vd]``, normalised likewise.

    Returns:
        ``[...]``.

    Example:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> forward_kl(half, half).item()
        0.0
    """
    log_p = log_p.detach()
    return torch.linalg.vecdot(log_p.exp(), log_p - log_q)

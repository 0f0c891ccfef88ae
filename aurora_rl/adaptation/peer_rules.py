"""Learning rules of other systems, as objectives that a configuration names by their import path."""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_rl.objectives import Windows, forward_kl


def osd(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Forward KL at the first draft of each window that the target would have answered otherwise.

    Online Speculative Decoding (Liu et al. 2023, arXiv 2310.07177, algorithm 2) keeps the distributions at the draft
    that ended a proposal, and distils from these alone.

    Args:
        log_p: Target, ``[J, C, Vd]``.
        log_q: Drafter, ``[J, C, Vd]``.
        windows: What the positions are.

    Returns:
        The divergence ``[J, C]`` in nats, and where it counts.

    Example:
        >>> sure = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log()  # one of each token
        >>> log_p, log_q = sure[[0, 0, 0]][:, None], sure[[0, 1, 1]][:, None]  # drafts two and three are wrong
        >>> rows = torch.zeros(3, 1, dtype=torch.int64)
        >>> osd(log_p, log_q, Windows(rows, rows[0], torch.ones(3, 1, dtype=torch.bool)))[1].flatten().tolist()
        [False, True, False]
    """
    right = log_p.argmax(-1) == log_q.argmax(-1)
    reached = torch.cat([torch.ones_like(right[:1]), right[:-1]]).cumprod(0).bool()
    return forward_kl(log_p, log_q), windows.valid & reached & ~right

"""An objective's function that tests name by its import path."""

from __future__ import annotations

from torch import Tensor

from aurora_rl.objectives import Windows, forward_kl


def plain_kl(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
    """Forward KL of every draft."""
    return forward_kl(log_p, log_q), windows.valid

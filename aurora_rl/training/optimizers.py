"""The optimizers of a drafter."""

from __future__ import annotations

import torch

from aurora_rl.policies import Drafter


def drafter_optimizers(
    drafter: Drafter, *, muon_lr: float = 0.02, adam_lr: float = 5e-4
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the drafter, and AdamW for norms and the draft head (docs/results.md).

    Raises:
        ValueError: The drafter has nothing to learn.
    """
    named = [(name, p) for name, p in drafter.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"{type(drafter).__name__} has no weights to learn; serve it alone, or choose another")
    matrices = [p for name, p in named if p.ndim == 2 and not _is_table(name)]
    other_parameters = [p for name, p in named if p.ndim != 2 or _is_table(name)]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        # Three Newton-Schulz iterations instead of five: they learn as much a step, and on a CPU the five take as long
        # as forward and backward together.
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, ns_steps=3))
    if other_parameters:
        optimizers.append(torch.optim.AdamW(other_parameters, lr=adam_lr, weight_decay=0.0))
    return optimizers


def _is_table(name: str) -> bool:
    """Return whether a matrix has a row for every token."""
    return "lm_head" in name or "embed" in name

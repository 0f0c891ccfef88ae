"""The optimizers of a drafter."""

from __future__ import annotations

import torch

from aurora_rl.policies import Drafter

_OF_ADAPTERS = 10  # their learning rate, by adam_lr


def drafter_optimizers(
    drafter: Drafter, *, muon_lr: float = 0.02, adam_lr: float = 5e-4
) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the drafter, and AdamW for norms, the draft head and adapters.

    Why is in docs/results.md. Adapters learn at ten times ``adam_lr``: LoRA wants about ten times the rate of the
    weights themselves (Schulman et al., "LoRA Without Regret", 2025), and Muon moves those faster still.

    Raises:
        ValueError: The drafter has nothing to learn.
    """
    if not (named := [(name, p) for name, p in drafter.named_parameters() if p.requires_grad]):
        raise ValueError(f"{type(drafter).__name__} has no weights to learn; serve it alone, or choose another")
    matrices = [p for name, p in named if p.ndim == 2 and not _is_table(name)]
    adapters = [p for name, p in named if "lora_" in name]
    other_parameters = [p for name, p in named if (p.ndim != 2 or _is_table(name)) and "lora_" not in name]
    optimizers: list[torch.optim.Optimizer] = []
    if matrices:
        # Three Newton-Schulz iterations instead of five: they learn as much a step, and on a CPU the five take as long
        # as forward and backward together.
        optimizers.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, ns_steps=3))
    rates = [(other_parameters, adam_lr), (adapters, _OF_ADAPTERS * adam_lr)]
    if groups := [{"params": parameters, "lr": lr} for parameters, lr in rates if parameters]:
        optimizers.append(torch.optim.AdamW(groups, lr=adam_lr, weight_decay=0.0))
    return optimizers


def _is_table(name: str) -> bool:
    """Return whether a matrix has a row for every token."""
    return "lm_head" in name or "embed" in name

"""Assertions of the conformance checks."""

from __future__ import annotations

import torch
from torch import Tensor

# Nats between what serving recorded and what training computes: trajectories hold log-probabilities in float32.
RECORDED = {torch.float64: 1e-5, torch.float32: 5e-4}
# Nats between two ways of computing the same log-probability.
COMPUTED = {torch.float64: 1e-9, torch.float32: 5e-4}


def require(condition: bool, message: str) -> None:
    """Assert, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def close(a: Tensor, b: Tensor, atol: float) -> bool:
    """Return whether log-probabilities agree to ``atol`` nats."""
    # Where both are −inf they agree, and their difference is not a number.
    return a.shape == b.shape and torch.allclose(a.clamp(min=-1e9), b.clamp(min=-1e9), rtol=0, atol=atol)

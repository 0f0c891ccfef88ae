"""What may be wrong with a drafter that serves, and how its tensors are compared with what they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

EVERY = 12
"""Rounds between two checks. All tensors are compared in :data:`PORTIONS` checks, hence within 36 rounds."""

PORTIONS = 3
"""Checks in which every tensor is compared once."""

_SAMPLE = 1 << 16  # numbers that are compared of a large tensor that never changes

Cause = Literal["corrupted", "stale", "mismatched", "cache", "dead"]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with a drafter.

    Attributes:
        cause: Its kind. corrupted: tensors are not those that were published. stale: they are those of an earlier
            version. mismatched: what is not published is not what it was (layers, the target's embedding, rotary
            tables). cache: its cache does not follow from the texts. dead: it drafts nothing.
        detail: What was compared, and how it differs.
    """

    cause: Cause
    detail: str


def sample(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor that are compared: all, or evenly spaced ones of a large tensor.

    Example:
        >>> len(sample(torch.zeros(3, 4))), len(sample(torch.zeros(1 << 20)))
        (12, 65536)
    """
    flat = tensor.detach().flatten()
    return flat[:: -(-len(flat) // _SAMPLE)] if len(flat) > _SAMPLE else flat


def difference(held: Tensor, published: Tensor) -> str:
    """Say how a tensor differs from the one that was published, of the same shape.

    Example:
        >>> published = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> difference(published.T, published), difference(0 * published, published)
        ('is transposed', 'is all zero')
    """
    if held.shape != published.shape:
        return f"has the shape {list(held.shape)}, not {list(published.shape)}"
    if held.is_floating_point() and (broken := int((~held.float().isfinite()).sum())):
        return f"has {broken} values that are infinite or not a number"
    if not bool(held.any()):
        return "is all zero"
    if held.ndim == 2 and torch.equal(held.flatten(), published.T.flatten()):
        return "is transposed"
    return f"differs from what was published in {int((held != published).sum())} of {held.numel()} values"

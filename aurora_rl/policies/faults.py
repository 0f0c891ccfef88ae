"""Faults of a serving drafter, and how its tensors are compared with earlier samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from aurora_rl.plausible import describe_not_finite

EVERY = 12
"""Rounds between two checks. All tensors are compared in :data:`PORTIONS` checks, hence within 36 rounds."""

PORTIONS = 3
"""Checks in which every tensor is compared once."""

_SAMPLE = 1 << 16  # numbers that are compared of a large tensor that never changes

Cause = Literal["corrupted", "stale", "mismatched", "cache", "dead"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of a drafter.

    Attributes:
        cause: Its kind. corrupted: tensors are not those that were published. stale: they are those of an earlier
            version. mismatched: what is not published is not what it was (layers, the target's embedding, rotary
            tables). cache: its cache does not follow from the texts. dead: it drafts nothing.
        detail: What was compared, and how it differs.
    """

    cause: Cause
    detail: str


class TensorSample(NamedTuple):
    """A copy of numbers of a tensor, by which :func:`unchanged` tells later whether it is what it was.

    Attributes:
        values: Every ``step``-th number of the flattened tensor.
        step: Distance of two of them in the tensor.
        shape: Shape of the tensor.
    """

    values: Tensor
    step: int
    shape: torch.Size


def sample(tensor: Tensor, most: int = _SAMPLE) -> TensorSample:
    """Copy the numbers of a tensor that are compared: all, or evenly spaced ones of a tensor of more than ``most``.

    Example:
        >>> len(sample(torch.zeros(3, 4)).values), len(sample(torch.zeros(1 << 20)).values)
        (12, 65536)
    """
    flat = tensor.detach().flatten()
    step = max(-(-len(flat) // most), 1)
    return TensorSample(flat[::step].clone(), step, tensor.shape)


def unchanged(held: Tensor, before: TensorSample) -> bool:
    """Return whether a tensor is what it was, cast to another floating-point dtype or with rows appended at most.

    Engines do both to rotary tables: they cast them to the dtype of the queries, and append rows for later positions.

    Args:
        held: The tensor now.
        before: Copy of its numbers.

    Example:
        >>> table = torch.tensor([[0.1, 0.2], [0.3, float("nan")]])
        >>> longer = torch.cat([table.bfloat16(), torch.ones(1, 2, dtype=torch.bfloat16)])
        >>> unchanged(longer, sample(table)), unchanged(2 * table, sample(table)), unchanged(table[:1], sample(table))
        (True, False, False)
    """
    longer = len(before.shape) > 1 and held.shape[1:] == before.shape[1:] and len(held) > before.shape[0]
    if held.shape != before.shape and not longer:
        return False
    now, then = held.detach().flatten()[: before.shape.numel() : before.step], before.values
    if now.dtype != then.dtype and not (now.is_floating_point() and then.is_floating_point()):
        return False
    return same(now, then.to(now)) or same(now.to(then), then)


def same(held: Tensor, before: Tensor) -> bool:
    """Return whether two tensors of one dtype are equal, NaN to NaN.

    Example:
        >>> same(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("nan")]))
        True
    """
    if torch.equal(held, before):
        return True
    bits = (each.detach().flatten().contiguous().view(torch.uint8) for each in (held, before))
    return held.shape == before.shape and torch.equal(*bits)


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
        return describe_not_finite(broken)
    if not bool(held.any()):
        return "is all zero"
    if held.ndim == 2 and torch.equal(held.flatten(), published.T.flatten()):
        return "is transposed"
    return f"differs from what was published in {int((held != published).sum())} of {held.numel()} values"

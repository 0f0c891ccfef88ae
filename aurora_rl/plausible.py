"""Numbers that come from elsewhere: finite, and of a magnitude that a model can have."""

from __future__ import annotations

from torch import Tensor

LARGEST = 1e8
"""Largest magnitude of a weight, a feature or a hidden state: no model has one of 1e6, and its square is finite."""


def implausible(tensor: Tensor) -> str | None:
    """Return what is wrong with the values of a tensor; None if they are finite and no larger than :data:`LARGEST`.

    Example:
        >>> import torch
        >>> implausible(torch.tensor([1.0, float("nan"), -float("inf")]))
        'has 2 values that are infinite or not a number'
        >>> implausible(torch.arange(3)), implausible(torch.zeros(0))
        (None, None)
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return None
    wide = tensor.float() if tensor.itemsize == 1 else tensor  # 8-bit floats have few operations
    low, high = map(float, wide.aminmax())
    if -LARGEST <= low and high <= LARGEST:  # neither holds for what is not a number
        return None
    if wrong := int((~wide.isfinite()).sum()):
        return describe_not_finite(wrong)
    beyond = int((wide.abs() > LARGEST).sum())
    return f"has {beyond} value{'' if beyond == 1 else 's'} beyond {LARGEST:.0e}"


def describe_not_finite(count: int) -> str:
    """Return what to say of a tensor of whose values ``count`` are not finite, at least one.

    Example:
        >>> describe_not_finite(1)
        'has 1 value that is infinite or not a number'
    """
    return f"has {count} {'value that is' if count == 1 else 'values that are'} infinite or not a number"

"""Tensors from the engine's device to the host, while the engine goes on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_host(tensor: Tensor) -> Tensor:
    """Return a copy on the CPU; from a GPU it is under way when this returns."""
    if tensor.device.type == "cpu":
        return tensor.clone()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copy.copy_(tensor, non_blocking=True)


def copies_done(device: torch.device) -> Callable[[], None]:
    """Return a function that waits for the copies begun on this device until now."""
    event = torch.get_device_module(device).Event()
    event.record()
    return event.synchronize

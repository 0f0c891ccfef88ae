"""Optimizer steps: one on a batch, and those on a stream that is learned from as it came."""

from __future__ import annotations

import logging
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.distributed.tensor import DTensor
from torchrl.objectives import LossModule

from aurora_rl.objectives import Objective
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.trajectories import pack

logger = logging.getLogger(__name__)


class SharedLoss(LossModule):
    """A loss of this process's part of each batch; other processes have the other parts."""

    @abstractmethod
    def part(self, batch: TensorDictBase) -> TensorDictBase:
        """Return this process's part of a batch."""

    @abstractmethod
    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Put the gradients of the whole batch, the sum over all processes, in the place of those of the part."""


def train_step(
    loss: LossModule, optimizers: Sequence[torch.optim.Optimizer], batch: TensorDictBase, *, autocast: bool
) -> tuple[float, TensorDictBase]:
    """Take one step on the sum of a loss's "loss_" entries, with the gradient's norm clipped to 1.

    Args:
        loss: Loss of packed batches.
        optimizers: Optimizers of all parameters that learn.
        batch: Packed batch, which is moved to their device.
        autocast: Whether to compute in bfloat16.

    Returns:
        The sum, and what the loss returned.

    Raises:
        FloatingPointError: The sum or its gradient is not finite; no step was taken.
    """
    try:
        value, out = gradient(loss, optimizers, batch, autocast=autocast)
        for optimizer in optimizers:
            optimizer.step()
    finally:
        forget_gradient(optimizers)
    return value, out


def rounded(value: Tensor) -> float | list[float]:
    """Return a number of a loss, or several, to four places, for the log.

    Example:
        >>> rounded(torch.tensor([0.5, 0.25])), rounded(torch.tensor(1.0))
        ([0.5, 0.25], 1.0)
    """
    digits = value.detach().double().mul(1e4).round().div(1e4)
    return digits.tolist() if digits.ndim else digits.item()


def has_finite_step(
    loss: LossModule, optimizers: Sequence[torch.optim.Optimizer], batch: TensorDictBase, *, autocast: bool
) -> bool:
    """Return whether `train_step` could take a step on a batch. Takes none."""
    try:
        gradient(loss, optimizers, batch, autocast=autocast)
    except FloatingPointError:
        return False
    finally:
        forget_gradient(optimizers)
    return True


def gradient(
    loss: LossModule, optimizers: Sequence[torch.optim.Optimizer], batch: TensorDictBase, *, autocast: bool
) -> tuple[float, TensorDictBase]:
    """Compute the loss and its clipped gradient, which the parameters have then; see `train_step`."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    device = parameters[0].device
    batch = (loss.part(batch) if isinstance(loss, SharedLoss) else batch).to(device)
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        # RMSNorm of a bfloat16 input by float32 weights is not fused, which follows from autocast.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        out = loss(batch)
    total: Tensor = torch.stack([value for key, value in out.items() if key.startswith("loss_")]).sum()
    value = float(total.detach())
    forget_gradient(optimizers)
    total.backward()
    if isinstance(loss, SharedLoss):
        loss.add_gradients(parameters)
    clipped = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise FloatingPointError(f"loss is {value}, its gradient's norm {norm}")
    return value, out


def forget_gradient(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Free the gradients of an optimizer's parameters."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)  # it would take memory next to what the next forward keeps


def train_on(
    stream: Sequence[TensorDictBase],
    loss: LossModule,
    optimizers: Sequence[torch.optim.Optimizer],
    *,
    batch_size: int = 4,
    replay: int = 4,
    autocast: bool = False,
    seed: int = 0,
    max_skipped: int = 20,
    on_skip: Callable[[str], None] = lambda reason: None,
) -> Iterator[tuple[int, float, TensorDictBase]]:
    """Learn from a recorded stream as a learner does from one that arrives.

    Each trajectory is learned from once in its turn, in a batch with its neighbours. Replayed batches of earlier
    trajectories follow. Between two batches the caller may evaluate on trajectories that are still to come.

    Args:
        stream: Trajectories in order of arrival.
        loss: Loss of packed batches.
        optimizers: Optimizers of all parameters that learn.
        batch_size: Trajectories of a step; the last new batch may have fewer.
        replay: Replayed batches for each new one.
        autocast: Whether to compute in bfloat16.
        seed: Seed of the replay.
        max_skipped: Steps in a row whose loss or gradient is not finite. Such a step is skipped, with a warning.
        on_skip: Called with the reason of each skipped step.

    Yields:
        After each new batch and its replays: trajectories seen, the last step's loss, and the loss's output. The loss
        is NaN and the output empty as long as every step was skipped.

    Raises:
        FloatingPointError: More skipped steps in a row.
        ValueError: The stream is shorter than a batch, or it has ended without a single drafted node and an objective
            learns from nodes.
    """
    if len(stream) < batch_size:
        raise ValueError(
            f"the stream has {len(stream)} requests, fewer than the batch_size={batch_size} of a step; lower it"
        )
    buffer = trajectory_buffer(len(stream), batch_size, seed)
    value, out, skipped = math.nan, TensorDict(), 0
    for first in range(0, len(stream), batch_size):
        new = [stream[index] for index in range(first, min(first + batch_size, len(stream)))]
        buffer.extend(new)
        for batch in chain([pack(new)], (buffer.sample() for _ in range(replay))):
            try:
                value, out = train_step(loss, optimizers, batch, autocast=autocast)
                skipped = 0
            except FloatingPointError as error:
                skipped += 1
                on_skip(str(error))
                logger.warning("a step was skipped after %d trajectories: %s", first, error)
                if skipped > max_skipped:
                    raise
        yield first + len(new), value, out
    check_nodes(loss)


def check_nodes(loss: LossModule) -> None:
    """Raise ValueError if an objective learns from drafted nodes and has seen none."""
    for objective in loss.modules():
        if isinstance(objective, Objective):
            objective.check_nodes()

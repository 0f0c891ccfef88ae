"""Optimizer steps, online and from recordings."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule

from aurora_rl.objectives import Objective
from aurora_rl.policies import Drafter
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.trajectories import pack

logger = logging.getLogger(__name__)


def drafter_optimizers(drafter: Drafter, *, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """Muon on the matrices inside the drafter, AdamW on norms and on the draft head (docs/results.md).

    Raises:
        ValueError: the drafter has nothing to learn.
    """
    named = [(name, p) for name, p in drafter.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(f"{type(drafter).__name__} has no weights to learn; serve it alone, or choose another")
    matrices = [p for name, p in named if p.ndim == 2 and not _is_table(name)]
    others = [p for name, p in named if p.ndim != 2 or _is_table(name)]
    made: list[torch.optim.Optimizer] = []
    if matrices:
        # Three Newton-Schulz iterations instead of five: they learn as much a step, and on a CPU the five take as long
        # as forward and backward together.
        made.append(torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.0, ns_steps=3))
    if others:
        made.append(torch.optim.AdamW(others, lr=adam_lr, weight_decay=0.0))
    return made


def _is_table(name: str) -> bool:
    """Whether a matrix has a row for every token."""
    return "lm_head" in name or "embed" in name


def train_step(
    loss: LossModule, optimizers: Sequence[torch.optim.Optimizer], batch: TensorDictBase, *, autocast: bool
) -> tuple[float, TensorDictBase]:
    """One step on the sum of a loss's "loss_" entries, the gradient's norm clipped to 1.

    Args:
        loss: of packed batches.
        optimizers: together over all parameters that learn.
        batch: on their device.
        autocast: whether to compute in bfloat16.

    Returns:
        The sum, and what the loss returned.

    Raises:
        FloatingPointError: the sum or its gradient is not finite; no step was taken.
    """
    device = batch["sequence", "tokens"].device
    with warnings.catch_warnings(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        # RMSNorm of a bfloat16 input by float32 weights is not fused: no news to whoever asked for autocast.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
        out = loss(batch)
    total: Tensor = torch.stack([value for key, value in out.items() if key.startswith("loss_")]).sum()
    value = float(total.detach())
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    total.backward()
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
    finite = math.isfinite(value) and math.isfinite(norm)
    for optimizer in optimizers:
        if finite:
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # it would take memory next to what the next forward keeps
    if not finite:
        raise FloatingPointError(f"loss is {value}, its gradient's norm {norm}")
    return value, out


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

    Each trajectory is learned from once in its turn, in a batch with its neighbours, and replayed batches of what came
    before follow. Between two batches whoever iterates may evaluate on what is still to come.

    Args:
        stream: in order of arrival.
        loss: see :func:`train_step`, as ``optimizers`` and ``autocast``.
        optimizers: see there.
        batch_size: trajectories of a step.
        replay: replayed batches for each new one.
        autocast: see there.
        seed: of the replay.
        max_skipped: steps in a row whose loss or gradient is not finite. Such a step is skipped, with a warning.
        on_skip: called with the reason of each skipped step, for whoever counts them.

    Yields:
        After each new batch and its replays: trajectories seen, the last step's loss, and what it returned; NaN and
        nothing as long as every step was skipped.

    Raises:
        FloatingPointError: more skipped steps in a row.
        ValueError: the stream is shorter than a batch, or it has ended without a single drafted node and an objective
            learns from nodes.
    """
    if len(stream) < batch_size:
        raise ValueError(f"the stream has {len(stream)} requests, fewer than the batch_size={batch_size} of a step")
    buffer = trajectory_buffer(len(stream), batch_size, seed)
    value, out, skipped = math.nan, TensorDict(), 0
    for first in range(0, len(stream) - batch_size + 1, batch_size):
        new = [stream[index] for index in range(first, first + batch_size)]
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
        yield first + batch_size, value, out
    for objective in loss.modules():
        if isinstance(objective, Objective):
            objective.check_nodes()

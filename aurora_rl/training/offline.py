"""Learning from recorded trajectories in epochs, and replaying them by group."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from tensordict import TensorDictBase
from torchrl.objectives import LossModule

from aurora_rl.collectors.codec import checksum
from aurora_rl.policies import Drafter, TreeShape
from aurora_rl.storage import CheckpointError
from aurora_rl.training.checkpoint import load_training_state, save_training_state
from aurora_rl.training.gate import Replay
from aurora_rl.training.gate import replay as replay_stream
from aurora_rl.training.steps import check_nodes, train_step
from aurora_rl.trajectories import pack

logger = logging.getLogger(__name__)

_MAX_REPLAYED = 16  # requests in memory at a time


class Trajectories(Protocol):
    """Trajectories by their place: a list, or a dataset that reads one at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> TensorDictBase: ...


class OfflineTrainer:
    """Learns from recorded trajectories in epochs, and resumes at the step where it was.

    Each epoch has a random order that depends on the seed and its number alone. So a training that was interrupted and
    resumed ends with the same weights as one that was not. What does not fill a batch is left out of an epoch.

    Args:
        drafter: Drafter in training, float32.
        loss: Objective on packed batches of it.
        optimizers: Optimizers of its parameters.
        stream: Trajectories to learn from.
        batch_size: Trajectories of a step.
        autocast: Whether to compute in bfloat16.
        seed: Seed of the orders.
        max_skipped: Steps in a row whose loss or gradient may not be finite; such a step is skipped.

    Attributes:
        batches: Batches that were learned from or skipped.
        skipped: Batches whose loss or gradient was not finite.
        batches_per_epoch: Batches of an epoch.

    Raises:
        ValueError: There are fewer trajectories than ``batch_size``.

    Example:
        >>> from aurora_rl.objectives import ImitationLoss
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> from aurora_rl.training.optimizers import drafter_optimizers
        >>> parts = TargetParts.of(tiny_target())
        >>> drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16)).double()
        >>> optimizers = drafter_optimizers(drafter)
        >>> stream = [tiny_trajectory(drafter, request=number) for number in range(4)]
        >>> trainer = OfflineTrainer(drafter, ImitationLoss(drafter, parts.head), optimizers, stream, batch_size=2)
        >>> losses = [trainer.step() for _ in range(2 * trainer.batches_per_epoch)]
        >>> trainer.batches, trainer.skipped
        (4, 0)
    """

    def __init__(
        self,
        drafter: Drafter,
        loss: LossModule,
        optimizers: list[torch.optim.Optimizer],
        stream: Trajectories,
        *,
        batch_size: int = 4,
        autocast: bool = False,
        seed: int = 0,
        max_skipped: int = 20,
    ) -> None:
        if len(stream) < batch_size:
            raise ValueError(
                f"there are {len(stream)} trajectories, fewer than the batch_size={batch_size} of a step; lower it"
            )
        self._drafter, self._loss, self._optimizers, self._stream = drafter, loss, optimizers, stream
        self._batch_size, self._autocast, self._seed = batch_size, autocast, seed
        self._max_skipped, self._skipped_in_a_row = max_skipped, 0
        self.batches = self.skipped = 0
        self.batches_per_epoch = len(stream) // batch_size

    def step(self) -> tuple[float, TensorDictBase] | None:
        """Learn from the next batch.

        Returns:
            The loss and what the objectives returned; None if the step was skipped.

        Raises:
            FloatingPointError: More than ``max_skipped`` steps in a row had no finite loss and gradient.
            ValueError: An epoch has ended without a single drafted node, and an objective learns from nodes.
        """
        epoch, place = divmod(self.batches, self.batches_per_epoch)
        order = torch.randperm(len(self._stream), generator=torch.Generator().manual_seed(self._seed + epoch))
        indices = order[place * self._batch_size : (place + 1) * self._batch_size].tolist()
        batch = pack([self._stream[index] for index in indices])
        self.batches += 1
        result = None
        try:
            result = train_step(self._loss, self._optimizers, batch, autocast=self._autocast)
            self._skipped_in_a_row = 0
        except FloatingPointError as error:
            self.skipped += 1
            self._skipped_in_a_row += 1
            logger.warning("step %d was skipped: %s", self.batches, error)
            if self._skipped_in_a_row > self._max_skipped:
                raise
        if not self.batches % self.batches_per_epoch:
            check_nodes(self._loss)
        return result

    def save(self, folder: str | os.PathLike[str], **progress: Any) -> None:
        """Write weights, optimizer states and position; a learner can go on from the folder, too.

        Args:
            folder: Folder of the state; replaced as a whole.
            progress: JSON values to keep with the position.
        """
        counts = {
            "batches": self.batches,
            "skipped": self.skipped,
            "seen": self.batches * self._batch_size,
            "steps": self.batches - self.skipped,
            "version": 0,
            "draft_vocab": self._draft_vocab(),
        }
        save_training_state(folder, self._drafter, self._optimizers, {**progress, **counts})

    def resume(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Go on from what :meth:`save` wrote. Returns its ``progress`` and counts.

        Raises:
            CheckpointError: The folder is broken, or is of another drafter or draft vocabulary.
        """
        progress = load_training_state(folder, self._drafter, self._optimizers)
        if progress.get("draft_vocab") != self._draft_vocab():
            raise CheckpointError(f"{folder} was trained with another draft vocabulary; start from its drafter")
        self.batches, self.skipped = progress["batches"], progress["skipped"]
        return progress

    def _draft_vocab(self) -> str:
        return checksum({"draft_vocab": self._drafter.draft_vocab})


def replay_groups(drafter: Drafter, groups: Mapping[str, Trajectories], shape: TreeShape) -> dict[str, Replay]:
    """Replay groups of recorded requests, see :func:`aurora_rl.training.gate.replay`.

    Args:
        drafter: Drafter as it is served.
        groups: Requests by the name of their group, such as a domain.
        shape: Tree to draft in every round.
    """
    results = {}
    for name, stream in groups.items():
        parts = []
        for first in range(0, len(stream), _MAX_REPLAYED):
            indices = range(first, min(first + _MAX_REPLAYED, len(stream)))
            parts.append(replay_stream(drafter, [stream[index] for index in indices], shape))
        results[name] = Replay(torch.cat([part.tokens for part in parts]), torch.cat([part.rounds for part in parts]))
    return results

"""The stream of a scenario on disk, as any of its arms reads it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tensordict import TensorDict
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request
from aurora_rl.policies.lookup import NgramDrafter
from aurora_rl.policies.tree_shape import TreeShape
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.training.offline import Trajectories
from aurora_rl.trajectory_parts import part_of


class RecordedPhase(Dataset[TensorDict]):
    """The requests of one phase in the order in which they were asked, with the features of some layers.

    Args:
        folder: Folder of the recording.
        recorded: Layers whose features it holds.
        wanted: Layers that are read, all of them recorded.
    """

    def __init__(self, folder: Path, recorded: Sequence[int], wanted: Sequence[int]) -> None:
        self._dataset = TrajectoryDataset(folder, recorded)
        ids = self._dataset.numbers("request")  # those that end early are recorded early
        self._order = sorted(range(len(ids)), key=ids.__getitem__)
        self._recorded = len(recorded)
        self._places = [list(recorded).index(layer) for layer in wanted]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> TensorDict:
        """Return the trajectory of a request, by its place in the phase."""
        trajectory = self._dataset[self._order[index]]
        if self._places != list(range(self._recorded)):
            features = trajectory["sequence", "features"]
            by_layer = features.unflatten(-1, (self._recorded, -1)) if self._recorded else features[:, None]
            trajectory["sequence", "features"] = by_layer[:, self._places].flatten(1).contiguous()
        return trajectory


class Parts(Dataset[TensorDict]):
    """A stream's requests in parts of so many new tokens, see :mod:`aurora_rl.trajectory_parts`.

    Args:
        stream: Recorded requests, whose rounds drafted nothing.
        size: Tokens of a part; the last of a request may have fewer.

    Attributes:
        positions: Place of each part in its request, from 0.
    """

    def __init__(self, stream: Trajectories, size: int) -> None:
        self._stream = stream
        self._bounds: list[tuple[int, int, int]] = []  # request, first token, end
        self.positions: list[int] = []
        for request in range(len(stream)):
            sequence = stream[request]["sequence"]
            end = len(sequence["tokens"])
            for position, first in enumerate(range(int(sequence["prompt_length"]), end, size)):
                self._bounds.append((request, first, min(first + size, end)))
                self.positions.append(position)

    def __len__(self) -> int:
        return len(self._bounds)

    def __getitem__(self, index: int) -> TensorDict:
        """Return a part, as the trajectory of a request of its own."""
        request, first, end = self._bounds[index]
        return part_of(self._stream[request], first, end)

    def ended(self, index: int) -> TensorDict | None:
        """Return the whole request that ends with a part; None where it goes on."""
        request = self._bounds[index][0]
        last = index + 1 == len(self) or self._bounds[index + 1][0] != request
        return self._stream[request] if last else None


def record_plain_decoding(
    model: PreTrainedModel,
    requests: Sequence[Request],
    recording: TrajectoryDataset,
    layers: Sequence[int],
    **settings: Any,
) -> None:
    """Record the target's answers by plain decoding, with the features of some layers; see :func:`record_requests`."""
    nobody = NgramDrafter(model.config.get_text_config().vocab_size)
    nobody.feature_layers = tuple(layers)  # nothing is drafted: it says alone what is recorded
    record_requests(model, nobody, requests, recording, shape=TreeShape(0), **settings)

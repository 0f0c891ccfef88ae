"""A stream of trajectories on disk: one safetensors file each, in the order in which they came."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import Dataset

from aurora_rl.collectors.codec import SCHEMA
from aurora_rl.storage import save_tensors, write_file

_SCHEMA, _LAYERS = "schema", "feature_layers"  # keys in the metadata of each file


class TrajectoryDataset(Dataset[TensorDict]):
    """The trajectories of a folder.

    Args:
        folder: Folder of the recording; the first :meth:`append` creates it.
        feature_layers: Layers that the drafter of the trajectories reads, kept with each of them; None if that is
            not known.

    Raises:
        ValueError: The folder was recorded for a drafter of other layers, whose features may have the same width.

    Example:
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
        >>> with TemporaryDirectory() as folder:
        ...     recording = TrajectoryDataset(Path(folder))
        ...     recording.append(tiny_trajectory(drafter, request=7))
        ...     len(recording), int(recording[0]["request"])
        (1, 7)
    """

    def __init__(self, folder: str | os.PathLike[str], feature_layers: Sequence[int] | None = None) -> None:
        self.folder = Path(folder)
        self._count = sum(1 for _ in self.folder.glob("[0-9]*.safetensors"))
        # As safetensors keeps it, in text.
        self._layers = None if feature_layers is None else ",".join(map(str, feature_layers))
        recorded = self._recorded_layers()
        if None not in (recorded, self._layers) and recorded != self._layers:
            raise ValueError(
                f"{self.folder} was recorded for a drafter that reads layers {recorded or 'none'}, this one reads "
                f"{self._layers or 'none'}; take the drafter that it was recorded with, or another folder"
            )

    def _recorded_layers(self) -> str | None:
        """Return the layers of the features, as the first trajectory names them."""
        if not self._count:
            return None
        try:
            with safe_open(self._path(0), "pt") as file:
                return (file.metadata() or {}).get(_LAYERS)
        except (SafetensorError, OSError):
            return None  # reading it names what is wrong

    def _path(self, index: int) -> Path:
        return self.folder / f"{index:06d}.safetensors"

    def append(self, trajectory: TensorDictBase) -> None:
        """Append a trajectory. Its file is complete or absent."""
        self.folder.mkdir(parents=True, exist_ok=True)
        flat = {key: value.contiguous() for key, value in trajectory.flatten_keys(".").items()}
        metadata = {_SCHEMA: str(SCHEMA), **({} if self._layers is None else {_LAYERS: self._layers})}
        write_file(self._path(self._count), lambda path: save_tensors(flat, path, metadata))
        self._count += 1

    def __len__(self) -> int:
        """Return the number of trajectories in the folder."""
        return self._count

    def __getitem__(self, index: int) -> TensorDict:
        """Read the trajectory at an index, counted from 0.

        Raises:
            IndexError: There are not so many.
            ValueError: The file is not what :meth:`append` wrote, or has the layout of another release.
        """
        if not 0 <= index < self._count:
            raise IndexError(f"{self.folder} holds {self._count} trajectories, asked for number {index}")
        with self._opened(index) as file:
            flat = {name: file.get_tensor(name) for name in file.keys()}
        return TensorDict(flat, batch_size=[]).unflatten_keys(".")

    def numbers(self, name: str) -> list[int]:
        """Return one integer of each trajectory, and read nothing else of them.

        Args:
            name: Where it stands, such as "request" or "sampling.rule".

        Raises:
            ValueError: A file is broken, lacks it, or has the layout of another release.
        """
        found = []
        for index in range(self._count):
            with self._opened(index) as file:
                found.append(int(file.get_tensor(name)))
        return found

    @contextlib.contextmanager
    def _opened(self, index: int) -> Iterator[Any]:
        """Open a file of this layout; what is wrong with it, also while it is read, is a ValueError."""
        try:
            with safe_open(self._path(index), "pt") as file:
                schema, names = (file.metadata() or {}).get(_SCHEMA, str(SCHEMA)), file.keys()
                old = "spine.tokens" in names
                if old or schema != str(SCHEMA):
                    layout = "of an earlier release ('spine' for 'sequence')" if old else f"schema {schema}"
                    raise ValueError(
                        f"{self._path(index)} has the layout {layout}, this release reads {SCHEMA}; record the "
                        "requests again"
                    )
                yield file
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{self._path(index)} is no trajectory: {error}") from error

    def digest(self, count: int) -> str:
        """Return a checksum of the first ``count`` trajectories. It tells recordings of the same name apart."""
        digest = hashlib.sha256()
        for index in range(count):
            digest.update(self._path(index).read_bytes())
        return digest.hexdigest()[:16]

    def __iter__(self) -> Iterator[TensorDict]:
        """Read all trajectories, in order."""
        return (self[index] for index in range(len(self)))

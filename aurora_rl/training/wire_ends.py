"""The two ends of the wire, as a learner uses them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol

from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.telemetry.engine_counts import EngineCounts


class TrajectorySource(Protocol):
    """Where trajectories come from, such as :class:`~aurora_rl.collectors.collector.ZMQCollector`.

    Attributes:
        handshake_error: How the latest engine of another deployment differed.
        rejections: Messages dropped so far, by kind.
        engines: Counts by engine; a source counts what it drops itself.
    """

    handshake_error: str | None
    rejections: Counter[str]
    engines: EngineCounts

    @property
    def refused(self) -> int:
        """Connections refused so far for their keys."""

    def poll(self, timeout_s: float = 0.0) -> Sequence[TensorDictBase]:
        """Take the trajectories that have arrived, oldest first."""

    def take_deletions(self) -> Mapping[str, float]:
        """Take the tenants whose data is to be deleted, with the Unix times up to which."""

    def shutdown(self) -> None:
        """Take no more."""


class WeightSink(Protocol):
    """Where weights go, such as :class:`~aurora_rl.collectors.weights.WeightPublisher`."""

    error: str | None

    @property
    def refused(self) -> int:
        """Connections refused so far for their keys."""

    @property
    def served(self) -> Sequence[tuple[str, int, str]]:
        """Name, version and checksum of what each engine says that it serves, unless it was published here."""

    @property
    def next_version(self) -> int:
        """The least version that may be published next."""

    @property
    def overtaken(self) -> bool:
        """Whether an engine needs what is served under a new number: it ignores or missed the one it is to have."""

    def publish(self, version: int, tensors: Mapping[str, Tensor], /) -> object:
        """Hand weights on."""

    def rejected_by(self, version: int) -> Mapping[str, str]:
        """Return why engines did not load a version, or rolled it back, by their names."""

    def withdraw(self, version: int) -> bool:
        """Withdraw a version if engines rejected it and none serves it; return whether it was withdrawn."""

    def close(self) -> None:
        """Hand nothing on any more."""

"""Trajectories and weights: collected in one process, and over ZeroMQ by codec, sink, collector and weight sync."""

from typing import TYPE_CHECKING, Any

from aurora_rl.collectors.codec import CodecError, Limits, checksum, decode, encode
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver

if TYPE_CHECKING:
    from aurora_rl.collectors.env_collector import TrajectoryCollector

__all__ = [
    "CodecError",
    "Handshake",
    "Limits",
    "TrajectoryCollector",
    "TrajectorySink",
    "WeightPublisher",
    "WeightReceiver",
    "ZMQCollector",
    "checksum",
    "decode",
    "encode",
]


def __getattr__(name: str) -> Any:
    """Import what steps an environment when it is asked for: plugins in engines need the wire alone."""
    if name == "TrajectoryCollector":
        from aurora_rl.collectors.env_collector import TrajectoryCollector

        return TrajectoryCollector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

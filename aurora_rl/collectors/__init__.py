"""Trajectories and weights over ZeroMQ: codec, sink, collector, weight sync, replay buffer."""

from aurora_rl.collectors.codec import CodecError, Limits, checksum, decode, encode
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weight_scheme import ZMQWeightSyncScheme
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver
from aurora_rl.training.replay import trajectory_buffer

__all__ = [
    "CodecError",
    "Handshake",
    "Limits",
    "TrajectorySink",
    "WeightPublisher",
    "WeightReceiver",
    "ZMQCollector",
    "ZMQWeightSyncScheme",
    "checksum",
    "decode",
    "encode",
    "trajectory_buffer",
]

"""Trajectories and weights over ZeroMQ: codec, sink, collector, weight sync."""

from aurora_rl.collectors.codec import CodecError, Limits, checksum, decode, encode
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightPublisher, WeightReceiver

__all__ = [
    "CodecError",
    "Handshake",
    "Limits",
    "TrajectorySink",
    "WeightPublisher",
    "WeightReceiver",
    "ZMQCollector",
    "checksum",
    "decode",
    "encode",
]

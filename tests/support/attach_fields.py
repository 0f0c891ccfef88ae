"""What a learner sends to attach to SGLang: a handshake of a head of six tokens, and the fields of the request."""

from __future__ import annotations

import torch

from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.handshake import Handshake

HEAD, DRAFT_VOCAB = torch.arange(12.0).view(6, 2), torch.tensor([0, 2, 5])
HANDSHAKE = Handshake(1, "t", checksum({"head": HEAD}), (2, 4), checksum({"draft_vocab": DRAFT_VOCAB}), "eagle3")
FIELDS = {
    "trajectories": "tcp://127.0.0.1:1",
    "weights": "tcp://127.0.0.1:2",
    "keys": False,
    "handshake": HANDSHAKE.to_meta(),
    "version": 0,
    "capture_rate": 1.0,
    "queue": 4,
    "queue_bytes": 1 << 20,
    "max_age": 0,
    "max_message": 1 << 20,
    "top_k": 8,
    "max_bytes": 1 << 20,
    "store_bytes": 1 << 20,
    "part_tokens": 0,
}

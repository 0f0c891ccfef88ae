"""For tests on a real SGLang: its environment, requests, weights, and the ends of the wire that learn from it."""

import os
import time
from pathlib import Path

import torch

from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.trajectories import validate

NEW = 32


def environment() -> dict[str, str]:
    """For processes that import SGLang on a CPU; `tests/sglang_cpu/README.md` says what each entry is for."""
    path = [str(Path(__file__).parents[1] / "sglang_cpu"), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "OMP_NUM_THREADS": "1"}


def other_weights(drafter, seed):
    """As published, with another answer to nearly everything; those of seed 0 are the drafter's own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: t if name == "d2t" or not seed else t + t.std() * torch.randn(t.shape, generator=generator)
        for name, t in drafter.published().items()
    }


class Learner:
    """The learner's ends of the wire."""

    def __init__(self, handshake):
        self.handshake, self.got, self.parts = handshake, {}, {}
        self.collector = ZMQCollector("tcp://127.0.0.1:*", handshake=handshake, validate=self.check)
        self.publisher = WeightPublisher("tcp://127.0.0.1:*", handshake=handshake)
        self.trajectories, self.weights = self.collector.address, self.publisher.address

    def check(self, trajectory):
        validate(trajectory, vocab_size=512, feature_size=64 * len(self.handshake.feature_layers), hidden_size=64)

    def die(self):
        self.collector.shutdown()
        self.publisher.close()

    def come_back(self):
        self.collector = ZMQCollector(self.trajectories, handshake=self.handshake, validate=self.check)
        self.publisher = WeightPublisher(self.weights, handshake=self.handshake)

    def take(self, *requests, timeout=20.0):
        """The trajectories of these requests, of each the latest that came; `parts` has all."""
        deadline = time.monotonic() + timeout
        while not set(requests) <= set(self.got):
            assert time.monotonic() < deadline, f"only {sorted(self.got)} of {requests} came"
            for trajectory in self.collector.poll(timeout_s=0.1):
                self._keep(trajectory)
        assert self.collector.rejected == 0
        return [self.got[request] for request in requests]

    def take_parts(self, request, length):
        """The parts of a request, once they make up so many tokens."""
        deadline = time.monotonic() + 20.0
        while len(self.take(request)[0]["sequence", "tokens"]) < length:
            assert time.monotonic() < deadline, f"only {len(self.parts[request])} parts of {request} came"
            for trajectory in self.collector.poll(timeout_s=0.1):
                self._keep(trajectory)
        return self.parts[request]

    def _keep(self, trajectory):
        self.got[int(trajectory["request"])] = trajectory
        self.parts.setdefault(int(trajectory["request"]), []).append(trajectory)

    def publish(self, version, weights, engines=1):
        self.publisher.publish(version, weights)
        assert self.publisher.wait_ack(version, 20.0, engines=engines), self.publisher.engines


_numbers = iter(range(1, 10**6))


def requests(*lengths, new=NEW, seed=0, temperature=0.0):
    generator, sampling = torch.Generator().manual_seed(seed), SamplingParams(temperature, max_tokens=new)
    return [
        Request(next(_numbers), torch.randint(3, 250, (length,), generator=generator), sampling) for length in lengths
    ]

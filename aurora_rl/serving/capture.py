"""Choice of the requests that are captured: trajectories go to the learner, and answers to lookup."""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from aurora_rl.envs import Request


class Capture:
    """Decides about each request. One that is not captured is served as with ``learn=False``.

    Args:
        rate: Share of the requests that are captured, 0 to 1.
        opt_out: Tenants whose requests never are.
        seed: Key of the hash of a request's id that chooses the share, so that a run chooses the same again.

    Example:
        >>> import torch
        >>> capture, prompt = Capture(0.25, opt_out=["a"]), torch.tensor([3])
        >>> sum(capture(Request(id, prompt)) for id in range(1000))
        266
        >>> any(capture(Request(id, prompt, tenant="a")) for id in range(1000))
        False
    """

    def __init__(self, rate: float = 1.0, opt_out: Collection[str] = (), seed: int = 0) -> None:
        self._rate, self._opt_out, self._seed = rate, frozenset(opt_out), seed

    def __call__(self, request: Request) -> bool:
        """Return whether a request is captured."""
        if not request.learn or request.tenant in self._opt_out:
            return False
        digest = hashlib.blake2b(f"{self._seed}/{request.id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self._rate * 2**64

"""Specs of :class:`~aurora_rl.envs.SpecDecodeEnv`."""

from __future__ import annotations

from typing import Any

import torch
from torchrl.data import Binary, Bounded, Composite, Unbounded

from aurora_rl.envs.engine import Engine


def specs(engine: Engine, num_nodes: int, *, needs_q: bool) -> tuple[Composite, Composite]:
    """Return the specs of observations and of actions, with the drafter's distribution ``[B, N, V]`` if ``needs_q``."""
    features, hidden, device = engine.store.features, engine.store.hidden, engine.store.tokens.device
    b, n, width, vocab = engine.num_slots, num_nodes, num_nodes + 1, engine.vocab_size

    def floats(*shape: int, dtype: torch.dtype) -> Unbounded:
        return Unbounded(shape=(b, *shape), dtype=dtype, device=device)

    def ints(low: int, high: int, *shape: int) -> Bounded:
        return Bounded(low, high, shape=(b, *shape), dtype=torch.int64, device=device)

    def flags(*shape: int) -> Binary:
        return Binary(shape=(b, *shape), dtype=torch.bool, device=device)

    def group(**entries: Any) -> Composite:
        return Composite(**entries, shape=(b,), device=device)

    observation = group(
        is_init=flags(1),
        request=ints(-1, 2**62),
        speculate=flags(1),
        observation=group(
            tokens=ints(0, vocab - 1, width),
            num_new=ints(0, width),
            features=floats(width, features.shape[-1], dtype=features.dtype),
            position=ints(-1, engine.max_length),
        ),
        verifier=group(
            accepted=flags(n),
            hidden=floats(width, hidden.shape[-1], dtype=hidden.dtype),
            bonus_token=ints(-1, vocab - 1),
        ),
    )
    draft = {"tokens": ints(0, vocab - 1, n), "parents": ints(-1, n - 1, n), "mask": flags(n)}
    if needs_q:
        draft["q"] = Bounded(0.0, 1.0, shape=(b, n, vocab), dtype=torch.float32, device=device)
    return observation, group(draft=group(**draft))

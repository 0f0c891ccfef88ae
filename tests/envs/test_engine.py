"""The engine seam: sizes are the store's, a class that lacks a part cannot be built, and "sglang" is no engine here."""

from __future__ import annotations

import pytest
import torch

from aurora_rl.context import ContextStore
from aurora_rl.envs import Engine, TransformersEngine, get_engine, register_engine

PARTS = {"prefill", "verify", "logits", "commit", "release"}


def engine_without(*missing: str) -> type[Engine]:
    return type("Partial", (Engine,), {name: lambda self, *args: None for name in PARTS - set(missing)})


def test_slots_and_length_are_those_of_the_store() -> None:
    engine = engine_without()()
    engine.store = ContextStore(num_slots=3, max_length=17, feature_size=2, hidden_size=2, dtype=torch.float32)
    assert (engine.num_slots, engine.max_length) == (3, 17)


@pytest.mark.parametrize("part", sorted(PARTS))
def test_an_engine_that_lacks_a_part_cannot_be_built(part: str) -> None:
    with pytest.raises(TypeError, match=f"abstract method '?{part}"):
        engine_without(part)()


def test_the_name_of_the_remote_engine_is_reserved() -> None:
    with pytest.raises(ValueError, match="the engine name 'sglang' belongs to the configuration"):
        register_engine("sglang")(engine_without())


def test_engines() -> None:
    assert get_engine("transformers") is get_engine(f"{TransformersEngine.__module__}:TransformersEngine")
    with pytest.raises(ValueError, match="did you mean 'sglang'[?] There are sglang, transformers, vllm, and any"):
        get_engine("sglnag")
    with pytest.raises(ValueError, match="lacks commit, logits, prefill, release, verify"):
        register_engine("unfinished")(type("Unfinished", (Engine,), {}))

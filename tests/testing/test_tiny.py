"""Tiny targets and the trajectories served by them are legal and always the same."""

from __future__ import annotations

import pytest
import torch
from tiny_drafters import drafter_for

from aurora_rl.policies import MedusaDrafter, TreeShape
from aurora_rl.testing import serve, tiny_target, tiny_trajectory
from aurora_rl.trajectories import validate


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tiny_target_is_deterministic_and_leaves_the_global_generator_alone(architecture: str) -> None:
    before = torch.random.get_rng_state()
    first, second = (dict(tiny_target(architecture).named_parameters()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert next(iter(first.values())).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiny_trajectory_is_legal_and_always_the_same(dtype: torch.dtype) -> None:
    drafter = drafter_for(MedusaDrafter, tiny_target(dtype=dtype))
    modules = [type(m) for m in drafter.modules()]
    first, second = (tiny_trajectory(drafter, prompt_length=3, max_new_tokens=6, request=4) for _ in range(2))
    validate(first, vocab_size=32, feature_size=16, hidden_size=16)
    assert all(torch.equal(first[key], second[key]) for key in first.keys(True, True))
    assert first["sequence", "features"].dtype == dtype
    assert (
        len(first["sequence", "tokens"]) == 9
        and int(first["sequence", "prompt_length"]) == 3
        and int(first["request"]) == 4
    )
    assert modules == [type(m) for m in drafter.modules()]  # a copy was put into inference form


def test_serving_gives_every_prompt_its_trajectory_in_order() -> None:
    target = tiny_target()
    prompts = [torch.arange(n) for n in (4, 1, 2)]
    trajectories = serve(
        drafter_for(MedusaDrafter, target), target, prompts, shape=TreeShape(2), num_slots=2, first_request=7
    )
    assert [int(t["request"]) for t in trajectories] == [7, 8, 9]
    assert [t["sequence", "tokens"][: len(p)].tolist() for t, p in zip(trajectories, prompts, strict=True)] == [
        p.tolist() for p in prompts
    ]

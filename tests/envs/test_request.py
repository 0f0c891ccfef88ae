"""Requests and completions: how they were sampled by default, and why a completion ended."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aurora_rl.envs import Completion, Request, SamplingParams


def test_requests_do_not_share_their_sampling() -> None:
    first, second = (Request(number, torch.tensor([3])) for number in range(2))
    assert first.sampling_params == second.sampling_params == SamplingParams()
    assert first.sampling_params is not second.sampling_params


def test_a_sampled_request_without_a_seed_draws_one_and_keeps_it() -> None:
    params = SamplingParams(temperature=1.0)
    first, second = (Request(number, torch.tensor([3]), params) for number in range(2))
    assert params.seed is None and first.sampling_params.seed != second.sampling_params.seed
    assert 0 <= first.sampling_params.seed < 2**63
    assert dataclasses.replace(first, id=5).sampling_params == first.sampling_params
    assert Request(2, torch.tensor([3]), SamplingParams(temperature=1.0, seed=7)).sampling_params.seed == 7
    assert Request(3, torch.tensor([3]), SamplingParams()).sampling_params.seed is None  # greedy decoding draws nothing


def test_a_request_has_one_completion() -> None:
    with pytest.raises(ValueError, match=r"^n is 3; a request has one completion: .* sampling_params\.copies\(\)$"):
        Request(0, torch.tensor([3]), SamplingParams(n=3))


@pytest.mark.parametrize(
    ("terminated", "error", "reason"),
    [(True, None, "stop"), (False, None, "length"), (False, "too long", "error"), (True, "too long", "error")],
)
def test_a_completion_says_why_it_ended(terminated: bool, error: str | None, reason: str) -> None:
    completion = Completion(Request(0, torch.tensor([3])), torch.tensor([4]), terminated, error=error)
    assert completion.finish_reason == reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        completion.terminated = not terminated  # type: ignore[misc]

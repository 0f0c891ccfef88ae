"""Requests and completions: how they were sampled by default, and why a completion ended."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from aurora_rl.envs import Completion, Request, SamplingParams


def test_requests_do_not_share_their_sampling() -> None:
    first, second = (Request(number, torch.tensor([3])) for number in range(2))
    assert first.sampling == second.sampling == SamplingParams()
    assert first.sampling is not second.sampling


@pytest.mark.parametrize(
    ("terminated", "error", "reason"),
    [(True, None, "stop"), (False, None, "length"), (False, "too long", "error"), (True, "too long", "error")],
)
def test_a_completion_says_why_it_ended(terminated: bool, error: str | None, reason: str) -> None:
    completion = Completion(Request(0, torch.tensor([3])), torch.tensor([4]), terminated, error=error)
    assert completion.finish_reason == reason
    with pytest.raises(dataclasses.FrozenInstanceError):
        completion.terminated = not terminated  # type: ignore[misc]

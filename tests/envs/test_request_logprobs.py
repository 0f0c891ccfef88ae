"""Log-probabilities of delivered tokens, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from aurora_rl.envs.request import token_logprobs


def test_each_token_has_its_own_and_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 5.0]])
    total = math.log(sum(math.exp(x) for x in (1, 2, 3)))
    first, second = token_logprobs(logits, [0, 2], top=2)
    assert first.logprob == pytest.approx(1 - total)
    assert [token for token, _ in first.top] == [2, 1]
    assert [value for _, value in first.top] == pytest.approx([3 - total, 2 - total])
    assert second.logprob == second.top[0][1] == pytest.approx(5 - math.log(2 + math.exp(5)))


def test_no_more_are_listed_than_there_are_and_none_if_none_is_wanted() -> None:
    assert len(token_logprobs(torch.zeros(1, 3), [1], top=20)[0].top) == 3
    assert token_logprobs(torch.zeros(1, 3), [1], top=0)[0].top == []
    assert token_logprobs(torch.zeros(0, 3), [], top=2) == []

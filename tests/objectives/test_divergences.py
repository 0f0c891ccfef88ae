"""Divergences against literal numbers, PyTorch and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import kl_div

from aurora_rl.objectives.divergences import forward_kl
from aurora_rl.policies.drafter import log_softmax


def test_forward_kl_of_literal_distributions() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL = 1/2 log 2 + 1/2 log 2/3.
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    assert forward_kl(p, q).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert forward_kl(q, p).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert forward_kl(p, p).item() == 0.0


def test_forward_kl_equals_torch() -> None:
    p, q = (torch.randn(3, 4, 7, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    expected = kl_div(q, p, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(forward_kl(p, q), expected)


def test_forward_kl_gradient_is_q_minus_p_and_none_reaches_the_target() -> None:
    p = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda logits: forward_kl(log_softmax(p.detach()), log_softmax(logits)), (q,))
    forward_kl(log_softmax(p), log_softmax(q)).sum().backward()
    torch.testing.assert_close(q.grad, (q.softmax(-1) - p.softmax(-1)).detach())
    assert p.grad is None


def test_forward_kl_of_a_point_mass_is_the_surprise() -> None:
    p, q = torch.tensor([1e4, 0.0, 0.0]), torch.tensor([0.0, 1.0, 2.0])
    value = forward_kl(log_softmax(p), log_softmax(q))
    assert value.item() == pytest.approx(-q.log_softmax(-1)[0].item())


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_values_are_float32_or_wider(dtype: torch.dtype, computed: torch.dtype) -> None:
    logits = torch.randn(2, 5).to(dtype)
    assert log_softmax(logits).dtype == computed

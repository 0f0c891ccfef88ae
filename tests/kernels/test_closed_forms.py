"""Every closed form against the divergence of the same name in aurora_rl, differentiated by autograd in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from closed_form_cases import CASES, REFUSED
from torch import Tensor

from aurora_kernels import CLOSED_FORMS, closed_form
from aurora_rl.objectives import get_divergence


def laws(kind: str) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a target and logits of a drafter, of 5 rows and 37 tokens."""
    generator = torch.Generator().manual_seed(0)
    log_p = (3 * torch.randn(5, 37, dtype=torch.float64, generator=generator)).log_softmax(-1)
    logits = 3 * torch.randn(5, 37, dtype=torch.float64, generator=generator)
    if kind == "part of the mass":
        log_p = log_p - torch.rand(5, 1, generator=generator)
    elif kind == "a few tokens":
        log_p = log_p.masked_fill(log_p < log_p.topk(3, dim=-1).values[:, -1:], -math.inf).log_softmax(-1)
    elif kind == "apart":
        log_p = torch.where(torch.arange(37) < 9, log_p, -math.inf).log_softmax(-1)
        logits = torch.where(torch.arange(37) < 9, -300.0, logits)
    elif kind == "equal":
        logits = log_p.clone()
    return log_p, logits


@pytest.mark.parametrize("kind", ["plain", "part of the mass", "a few tokens", "apart", "equal"])
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_values_and_gradients_are_those_of_autograd(name: str, settings: dict[str, Any], kind: str) -> None:
    log_p, logits = laws(kind)
    leaf = logits.clone().requires_grad_()
    expected = get_divergence({"name": name, **settings})(log_p, leaf.log_softmax(-1))
    (slope,) = torch.autograd.grad(expected.sum(), leaf)
    before = log_p.clone()
    value, gradient = closed_form(name, **settings).function(log_p, logits.log_softmax(-1))
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-8, atol=1e-12)
    assert torch.equal(log_p, before)


@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_what_is_not_a_number_shows_in_its_row_alone(name: str) -> None:
    log_p, logits = laws("plain")
    expected = closed_form(name).function(log_p, logits.log_softmax(-1))[0]
    for spoiled in (log_p, logits):
        kept, spoiled[1, 4] = spoiled[1].clone(), math.nan
        value, _ = closed_form(name).function(log_p, logits.log_softmax(-1))
        assert value.isnan().tolist() == [False, True, False, False, False]
        assert torch.equal(value[2:], expected[2:])
        spoiled[1] = kept


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("forward", {}, "no closed form is called 'forward'; there are forward_kl, "),
        ("forward_kl", {"beta": 0.5}, "'forward_kl' has no setting 'beta'; it has none"),
        ("jensen_shannon", {"beta": 0.5, "skew": 0.5}, "'jensen_shannon' has no setting 'skew'; it has beta"),
        *REFUSED,
    ],
)
def test_bad_settings_are_refused(name: str, settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        closed_form(name, **settings).function(*laws("equal"))

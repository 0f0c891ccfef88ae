"""Divergences against literal numbers, PyTorch and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from closed_form_cases import REFUSED
from torch import Tensor
from torch.nn.functional import kl_div

from aurora_kernels.rows import log_softmax
from aurora_rl.objectives import divergences
from aurora_rl.objectives.divergences import (
    DIVERGENCES,
    Divergence,
    forward_kl,
    get_divergence,
    jensen_shannon,
    negative_log_overlap,
    overlap,
    register_divergence,
    reverse_kl,
    top_k_cross_entropy,
    total_variation,
)


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


def test_jensen_shannon_weighs_the_target_with_beta() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4), beta = 1/4: m = (5/16, 11/16).
    p, q = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.25, 0.75]).double().log()
    to_p = 0.5 * math.log(8 / 5) + 0.5 * math.log(8 / 11)
    to_q = 0.25 * math.log(4 / 5) + 0.75 * math.log(12 / 11)
    assert jensen_shannon(p, q, 0.25).item() == pytest.approx(0.25 * to_p + 0.75 * to_q)
    assert jensen_shannon(p, q, 0.25).item() == pytest.approx(0.0260482, abs=1e-6)
    assert jensen_shannon(q, p, 0.25).item() == pytest.approx(0.0248700, abs=1e-6)


# ---- every divergence, against its formula written as a sum over tokens --------------------------------------------

FORMULAS: dict[str, Callable[[list[float], list[float]], float]] = {
    "forward_kl": lambda p, q: sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a),
    "reverse_kl": lambda p, q: sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)),
    "jensen_shannon": lambda p, q: sum(
        0.5 * a * math.log(2 * a / (a + b)) + 0.5 * b * math.log(2 * b / (a + b)) for a, b in zip(p, q, strict=True)
    ),
    "skewed_kl": lambda p, q: sum(a * math.log(a / (0.1 * a + 0.9 * b)) for a, b in zip(p, q, strict=True)),
    "total_variation": lambda p, q: 1 - sum(map(min, p, q)),
    "negative_log_overlap": lambda p, q: -math.log(sum(map(min, p, q))),
    "hybrid_overlap": lambda p, q: (
        math.exp(-3 * sum(map(min, p, q))) * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        + (1 - math.exp(-3 * sum(map(min, p, q)))) * (1 - sum(map(min, p, q)))
    ),
    "cross_entropy": lambda p, q: -math.log(q[p.index(max(p))]),
    "top_k_cross_entropy": lambda p, q: (
        -sum(a * math.log(b) for a, b in sorted(zip(p, q, strict=True), reverse=True)[:10])
    ),
    "missed_probability": lambda p, q: 1 - sum(a * b for a, b in zip(p, q, strict=True)),
}


def draw(rows: int, tokens: int, mass: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, q = (2 * torch.randn(rows, tokens, generator=generator, dtype=torch.float64) for _ in range(2))
    return p.log_softmax(-1) + math.log(mass), q


@pytest.mark.parametrize("mass", [1.0, 0.7], ids=["renormalised", "not renormalised"])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_values_are_those_of_the_formula(name: str, mass: float) -> None:
    log_p, logits = draw(4, 13, mass)
    got = get_divergence(name)(log_p, logits.log_softmax(-1))
    expected = [FORMULAS[name](p, q) for p, q in zip(log_p.exp().tolist(), logits.softmax(-1).tolist(), strict=True)]
    assert got.tolist() == pytest.approx(expected)


@pytest.mark.parametrize("mass", [1.0, 0.7], ids=["renormalised", "not renormalised"])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_gradients_are_those_of_finite_differences(name: str, mass: float) -> None:
    log_p, logits = draw(3, 7, mass)
    if name == "hybrid_overlap":  # its weight is held constant: the gradient is not that of the whole
        weight = torch.exp(-3 * overlap(log_p, logits.log_softmax(-1)))

        def value(logits: torch.Tensor) -> torch.Tensor:
            log_q = logits.log_softmax(-1)
            return weight * forward_kl(log_p, log_q) + (1 - weight) * total_variation(log_p, log_q)
    else:

        def value(logits: torch.Tensor) -> torch.Tensor:
            return get_divergence(name)(log_p, logits.log_softmax(-1))

    step = 1e-6
    numeric = torch.zeros_like(logits)
    for token in range(logits.shape[1]):
        moved = torch.zeros_like(logits)
        moved[:, token] = step
        numeric[:, token] = (value(logits + moved) - value(logits - moved)) / (2 * step)
    logits.requires_grad_(True)
    get_divergence(name)(log_p, logits.log_softmax(-1)).sum().backward()
    torch.testing.assert_close(logits.grad, numeric, rtol=1e-5, atol=1e-7)


def rejected(p: Tensor, q: Tensor) -> Tensor:
    """Total variation's, on which others build."""
    below = (q < p).double()
    return -q * (below - (q * below).sum(-1, keepdim=True))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(-1, keepdim=True)


def of_top_k(p: Tensor, k: int) -> Tensor:
    return torch.zeros_like(p).scatter(-1, p.topk(k).indices, 1.0)


def alpha(p: Tensor, q: Tensor) -> Tensor:
    return torch.minimum(p, q).sum(-1, keepdim=True)


# What the docstrings say, letter for letter.
GRADIENTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": lambda p, q: q * p.sum(-1, keepdim=True) - p,
    "reverse_kl": lambda p, q: q * (q.log() - p.log() - kl(q, p)),
    "jensen_shannon": lambda p, q: 0.5 * q * ((q / (p / 2 + q / 2)).log() - kl(q, p / 2 + q / 2)),
    "skewed_kl": lambda p, q: 0.9 * q * ((q * p / (0.1 * p + 0.9 * q)).sum(-1, keepdim=True) - p / (0.1 * p + 0.9 * q)),
    "total_variation": rejected,
    "negative_log_overlap": lambda p, q: rejected(p, q) / alpha(p, q),
    "hybrid_overlap": lambda p, q: (
        (-3 * alpha(p, q)).exp() * (q * p.sum(-1, keepdim=True) - p) + (1 - (-3 * alpha(p, q)).exp()) * rejected(p, q)
    ),
    "cross_entropy": lambda p, q: q - of_top_k(p, 1),
    "top_k_cross_entropy": lambda p, q: q * p.topk(10).values.sum(-1, keepdim=True) - p * of_top_k(p, 10),
    "missed_probability": lambda p, q: -q * (p - (p * q).sum(-1, keepdim=True)),
}


@pytest.mark.parametrize("mass", [1.0, 0.7], ids=["renormalised", "not renormalised"])
@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_gradients_are_those_of_the_docstrings(name: str, mass: float) -> None:
    log_p, logits = draw(4, 13, mass)
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(get_divergence(name)(log_p, logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(gradient, GRADIENTS[name](log_p.exp(), logits.softmax(-1).detach()))


def test_the_gradient_of_the_overlap_is_that_of_the_docstring() -> None:
    log_p, logits = draw(4, 13)
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(overlap(log_p, logits.log_softmax(-1)).sum(), logits)
    torch.testing.assert_close(gradient, -rejected(log_p.exp(), logits.softmax(-1).detach()))


@pytest.mark.parametrize("name", [*DIVERGENCES, "overlap"])
def test_every_function_states_gradient_and_source(name: str) -> None:
    documented = getattr(divergences, name).__doc__
    assert "Gradient: ``" in documented and "Source: " in documented


def test_conventions_of_the_kls() -> None:
    """What the module says of a target that is not renormalised."""
    (log_p, logits), (partial, _) = draw(4, 13), draw(4, 13, 0.7)
    logits.requires_grad_(True)
    for divergence, factor in ((forward_kl, 0.7), (reverse_kl, 1.0)):
        whole, part = (
            torch.autograd.grad(divergence(p, logits.log_softmax(-1)).sum(), logits)[0] for p in (log_p, partial)
        )
        torch.testing.assert_close(part, factor * whole)


# ---- an overlap that hardly is ---------------------------------------------------------------------------------------


def test_a_tiny_overlap_keeps_its_gradient() -> None:
    log_p = torch.tensor([[1.0 - 1e-9, 1e-9, 0.0]], dtype=torch.float64).log()
    logits = torch.tensor([[-19.41, 0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    assert overlap(log_p, logits.log_softmax(-1)).item() == pytest.approx(2e-9, rel=0.01)
    value = negative_log_overlap(log_p, logits.log_softmax(-1))
    torch.testing.assert_close(value, -overlap(log_p, logits.log_softmax(-1)).log())
    assert torch.autograd.gradcheck(lambda z: negative_log_overlap(log_p, z.log_softmax(-1)), (logits,))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient[0, 0] < -0.1  # it asks for the target's token


def test_no_overlap_at_all_is_finite() -> None:
    logits = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    log_p = torch.tensor([[0.0, *[-torch.inf] * 3], [-torch.inf] * 4], dtype=torch.float64)
    value = negative_log_overlap(log_p, logits.log_softmax(-1))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert bool(value.isfinite().all()) and bool(gradient.isfinite().all())
    assert bool(gradient[0].any()) and not bool(gradient[1].any())


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_tokens_that_the_target_excludes(name: str) -> None:
    """What top-k leaves of the target: a distribution with zeros has a finite value and gradient."""
    log_p, logits = draw(3, 7)
    log_p[:, :4] = -torch.inf
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    logits.requires_grad_(True)
    value = get_divergence(name)(log_p, logits.log_softmax(-1))
    value.sum().backward()
    assert bool(value.isfinite().all()) and bool(logits.grad.isfinite().all()) and bool(logits.grad.any())


def test_every_divergence_prefers_the_target_to_noise() -> None:
    log_p, noise = draw(50, 9)
    for name in DIVERGENCES:
        divergence = get_divergence(name)
        assert divergence(log_p, log_p).mean() < divergence(log_p, noise.log_softmax(-1)).mean(), name


def test_one_token_of_the_chain_rule_for_acceptance() -> None:
    """∇α by enumeration: the score function with reward 1[q < p], rejection sampling's policy gradient."""
    log_p, logits = draw(1, 6)
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(total_variation(log_p, logits.log_softmax(-1)).sum(), logits)
    q, p = logits.softmax(-1)[0].detach(), log_p.exp()[0]
    score = sum(q[x] * float(q[x] < p[x]) * (torch.nn.functional.one_hot(torch.tensor(x), 6) - q) for x in range(6))
    torch.testing.assert_close(gradient[0], -score)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_values_are_float32_or_wider(dtype: torch.dtype, computed: torch.dtype) -> None:
    logits = torch.randn(2, 5).to(dtype)
    assert log_softmax(logits).dtype == computed


# ---- names and settings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "function"),
    [
        ({"name": "jensen_shannon", "beta": 0.1}, lambda p, q: jensen_shannon(p, q, 0.1)),
        ({"name": "skewed_kl", "skew": 0}, forward_kl),
        ({"name": "hybrid_overlap", "decay": 0}, forward_kl),
        ({"name": "top_k_cross_entropy", "k": 2}, lambda p, q: top_k_cross_entropy(p, q, 2)),
        ({"name": "reverse_kl"}, reverse_kl),
        ("reverse_kl", reverse_kl),
        (reverse_kl, reverse_kl),
    ],
    ids=lambda x: getattr(x, "__name__", str(x)),
)
def test_a_divergence_by_name_and_settings(settings: str | dict[str, Any] | Divergence, function: Divergence) -> None:
    log_p, logits = draw(3, 7)
    log_q = logits.log_softmax(-1)
    torch.testing.assert_close(get_divergence(settings)(log_p, log_q), function(log_p, log_q))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.1}, "a divergence needs a name, got {'beta': 0.1}"),
        ({"name": "jsd"}, "no divergence is called 'jsd'; there are"),
        ({"name": "jensen_shannon", "bta": 0.1}, "'jensen_shannon' has no setting 'bta'; did you mean 'beta'"),
        ({"name": "jensen_shannon", "log_p": 0.1}, "'jensen_shannon' has no setting 'log_p'"),
        ({"name": "forward_kl", "beta": 0.1}, "'forward_kl' has no setting 'beta'; it has none"),
        *(({"name": name, **settings}, f"'{name}': {message}") for name, settings, message in REFUSED),
        ({"name": "jensen_shannon", "beta": 1}, r"'jensen_shannon': beta must lie in \(0, 1\), got 1$"),
        ({"name": "hybrid_overlap", "decay": "fast"}, "'hybrid_overlap': decay must be a number, got 'fast'"),
        ({"name": "top_k_cross_entropy", "k": 0}, "k must be at least 1, got 0"),
        ({"name": "top_k_cross_entropy", "k": 2.5}, "k must be an integer, got 2.5"),
    ],
    ids=str,
)
def test_wrong_settings_of_a_divergence(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_divergence(settings)


def test_a_function_may_look_at_many_tokens_and_its_own_fault_is_named() -> None:
    def ten_likeliest(log_p: Tensor, log_q: Tensor) -> Tensor:
        values, index = log_p.topk(10)
        return -(values.exp() * log_q.gather(-1, index)).sum(-1)

    def broken(log_p: Tensor, log_q: Tensor) -> Tensor:
        return log_q.gather(-1, torch.full_like(log_q, 10**6, dtype=torch.int64)).sum(-1)

    register_divergence("ten_likeliest")(ten_likeliest)
    register_divergence("broken")(broken)
    assert get_divergence("ten_likeliest") is ten_likeliest
    with pytest.raises(
        ValueError, match=r"divergence 'broken' fails on \[2, 256\] log-probabilities: RuntimeError: index"
    ):
        get_divergence("broken")

"""Divergences whose gradient in the drafter's logits is written down, so that autograd need not keep their steps.

Legend: ``p`` target, ``q`` drafter, ``α = Σ min(p, q)``, ``r`` rows, ``Vd`` draft vocabulary.

A function takes ``log_p`` and ``log_q``, ``[r, Vd]`` each, and returns values ``[r]`` and their gradient ``[r, Vd]`` in
the logits of ``q``. ``log_q`` is normalised, and a function may overwrite it. ``log_p`` may be −inf, and need not sum
to 1. In the indicators a token of ``q = p`` counts half, as in the gradient of ``torch.minimum``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from aurora_kernels.rows import exp, exp_

Gradients = tuple[Tensor, Tensor]

# exp of it is 0 in every dtype, and 0 times it is 0.
_NEVER = -1e4

_expect = torch.linalg.vecdot  # Σ p · values in one pass


@dataclass(frozen=True)
class ClosedForm:
    """A divergence with its gradient.

    Attributes:
        function: ``function(log_p, log_q)`` returns values ``[r]`` and their gradient in the logits, ``[r, Vd]``.
        name: Name in :data:`CLOSED_FORMS`, by which a GPU's kernel computes it. None for any other function.
        setting: Value of its keyword, such as ``beta``; 0.0 if it has none.
    """

    function: Callable[[Tensor, Tensor], Gradients]
    name: str | None = None
    setting: float = 0.0


def forward_kl(log_p: Tensor, log_q: Tensor) -> Gradients:
    """KL(p || q). Gradient: ``q_i Σp − p_i``."""
    p = exp(log_p)
    value = _expect(p, log_p.clamp(min=_NEVER)) - _expect(p, log_q)
    return value, exp_(log_q).mul_(p.sum(-1, keepdim=True)).sub_(p)


def reverse_kl(log_p: Tensor, log_q: Tensor) -> Gradients:
    """KL(q || p), where a token that ``p`` excludes costs 1e4 nats. Gradient: ``q_i (log q_i − log p_i − KL)``."""
    ratio = log_q - log_p.clamp(min=_NEVER)
    q = exp_(log_q)
    value = _expect(q, ratio)
    return value, ratio.sub_(value[:, None]).mul_(q)


def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Gradients:
    """β KL(p || m) + (1 − β) KL(q || m), m = β p + (1 − β) q. Gradient: ``(1 − β) q_i (log(q_i / m_i) − KL(q || m))``.

    Raises:
        ValueError: β outside (0, 1).
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), got {beta}")
    log_p = log_p.clamp(min=_NEVER)
    p, q = exp(log_p), exp(log_q)
    log_m = (beta * p).add_(q, alpha=1 - beta).clamp_(min=torch.finfo(q.dtype).tiny).log_()
    to_mixture = log_q.sub_(log_m)
    divergence = _expect(q, to_mixture)
    value = beta * _expect(p, log_p.sub_(log_m)) + (1 - beta) * divergence
    return value, to_mixture.sub_(divergence[:, None]).mul_(q).mul_(1 - beta)


def skewed_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Gradients:
    """KL(p || m), m = λ p + (1 − λ) q, λ = ``skew``. Gradient: ``(1 − λ) q_i (Σ q p / m − p_i / m_i)``.

    Raises:
        ValueError: λ outside [0, 1).
    """
    if not 0 <= skew < 1:
        raise ValueError(f"skew must lie in [0, 1), got {skew}")
    log_p = log_p.clamp(min=_NEVER)
    p, q = exp(log_p), exp_(log_q)
    mixed = (skew * p).add_(q, alpha=1 - skew).clamp_(min=torch.finfo(q.dtype).tiny)
    share = p / mixed
    value = _expect(p, log_p.sub_(mixed.log_()))
    return value, share.sub_(_expect(q, share)[:, None]).mul_(q).mul_(skew - 1)


def total_variation(log_p: Tensor, log_q: Tensor) -> Gradients:
    """1 − α. Gradient: ``−q_i (1[q_i < p_i] − s)`` with ``s = Σ q 1[q < p]``."""
    p, q = exp(log_p), exp_(log_q)
    value = 1 - torch.minimum(p, q).sum(-1)
    side = p.sub_(q).sign_().mul_(0.5)  # the indicator less a half, which is a constant: it has no gradient
    return value, side.sub_(_expect(q, side)[:, None]).mul_(q).neg_()


def negative_log_overlap(log_p: Tensor, log_q: Tensor) -> Gradients:
    """−log α. Gradient: that of total variation over α, in logarithms, so that a small α keeps it."""
    least = torch.minimum(log_p, log_q)
    below = (log_q < log_p).to(log_q.dtype).add_(log_q == log_p, alpha=0.5).mul_(least >= _NEVER)
    least.clamp_(min=_NEVER)
    log_overlap = least.logsumexp(-1)
    taken = exp_(least.sub_(log_overlap[:, None])).mul_(below)
    return -log_overlap, exp_(log_q).mul_(taken.sum(-1, keepdim=True)).sub_(taken)


def hybrid_overlap(log_p: Tensor, log_q: Tensor, decay: float = 3.0) -> Gradients:
    """Mix KL(p || q) and 1 − α by w = exp(−decay · α) and 1 − w, held constant. Gradient: that of both, by the weights.

    Raises:
        ValueError: ``decay`` negative or infinite.
    """
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be finite and not negative, got {decay}")
    variation, to_overlap = total_variation(log_p, log_q.clone())
    divergence, to_target = forward_kl(log_p, log_q)
    weight = torch.exp(-decay * (1 - variation))
    value = weight * divergence + (1 - weight) * variation
    return value, to_overlap.lerp_(to_target, weight[:, None])


def cross_entropy(log_p: Tensor, log_q: Tensor) -> Gradients:
    """−log q(argmax p). Gradient: ``q_i − 1[i = argmax p]``."""
    best = log_p.max(-1, keepdim=True)
    # Values that are not numbers have no largest.
    value = torch.where(best.values.isnan(), torch.nan, -log_q.gather(-1, best.indices))
    return value[:, 0], exp_(log_q).scatter_add_(-1, best.indices, torch.full_like(value, -1.0))


def missed_probability(log_p: Tensor, log_q: Tensor) -> Gradients:
    """1 − Σ p q. Gradient: ``−q_i (p_i − Σ p q)``."""
    p, q = exp(log_p), exp_(log_q)
    matched = _expect(p, q)
    return 1 - matched, p.sub_(matched[:, None]).mul_(q).neg_()


CLOSED_FORMS: dict[str, Callable[..., Gradients]] = {
    function.__name__: function
    for function in (
        forward_kl, reverse_kl, jensen_shannon, skewed_kl, total_variation, negative_log_overlap, hybrid_overlap,
        cross_entropy, missed_probability,
    )
}  # fmt: skip
"""Divergences with a closed form, by name. ``aurora_rl.objectives.divergences`` has each under the same name."""


def closed_form(name: str, **settings: float) -> ClosedForm:
    """Return a divergence of :data:`CLOSED_FORMS`.

    Args:
        name: Its name.
        settings: Its keywords, such as ``beta`` of ``jensen_shannon``.

    Raises:
        ValueError: The name or a setting is unknown, or a setting is out of range.

    Example:
        >>> half = torch.tensor([[0.5, 0.5]]).log()
        >>> value, gradient = closed_form("forward_kl").function(half, torch.tensor([[0.25, 0.75]]).log())
        >>> gradient
        tensor([[-0.2500,  0.2500]])
    """
    if name not in CLOSED_FORMS:
        raise ValueError(f"no closed form is called {name!r}; there are {', '.join(CLOSED_FORMS)}")
    function = CLOSED_FORMS[name]
    known = list(inspect.signature(function).parameters)[2:]
    if unknown := [each for each in settings if each not in known]:
        raise ValueError(f"{name!r} has no setting {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    bound = partial(function, **settings)
    bound(torch.zeros(1, 1), torch.zeros(1, 1))  # checks the settings
    (setting,) = settings.values() or getattr(function, "__defaults__", None) or (0.0,)
    return ClosedForm(bound, name, setting)

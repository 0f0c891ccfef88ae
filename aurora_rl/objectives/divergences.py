"""Divergences between the target's distribution and the drafter's: plain functions of log-probabilities, to minimise.

Legend: ``p`` target, ``q`` drafter, ``Vd`` draft vocabulary, ``α = Σ min(p, q)`` their overlap, ``s = Σ q 1[q < p]``.

Every function takes ``log_p`` and ``log_q``, each ``[..., Vd]``, and gives ``[...]``, in nats where it is a logarithm.
``log_q`` is normalised over the draft vocabulary. ``log_p`` is a constant: no gradient flows. It may be −inf, as top-k
and top-p leave it, and comes in one of two conventions:

- *renormalised* over the draft vocabulary: the drafter learns the target's preferences among the tokens that it has;
- *not renormalised*: it sums to the mass ``Σp`` that the draft vocabulary covers. Only so is ``α`` what rejection
  sampling accepts. For the others, what was best is still best, but their least value is not 0 any more. The forward
  KL's gradient is the renormalised one's times ``Σp``, so that positions count by how much of them can be drafted; the
  reverse KL's is the same.

A *gradient* is that in the logits of ``q``, entry ``i``: of a derivative ``g`` in ``q`` it is ``q_i (g_i − Σ q g)``.
In the indicators a token of ``q = p`` counts half.

Temperature, min-p, top-k and top-p belong into ``log_p`` and ``log_q`` before the call: what is
served is what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from aurora_kernels import CLOSED_FORMS, ClosedForm, closed_form
from aurora_rl.registry import Registry
from aurora_rl.settings import check_values, settings_of

Divergence = Callable[..., Tensor]
"""Function of log-probabilities of the target and of the drafter, ``[..., Vd]`` each, that returns ``[...]``."""

_D = TypeVar("_D", bound=Divergence)

DIVERGENCES: Registry[Divergence] = Registry("divergence", "aurora_rl.divergences")
"""Divergences by name, see :func:`register_divergence` and :func:`get_divergence`."""

_ACCEPTANCE: set[Divergence] = set()  # those that mean a probability of acceptance

_TRIED = 256  # tokens of the vocabulary on which a divergence is tried before it is used

# exp of it is 0 in every dtype, and 0 times it is 0.
_NEVER = -1e4


def register_divergence(name: str, *, renormalize: bool = True) -> Callable[[_D], _D]:
    """Make a function of ``log_p``, ``log_q`` and keywords available by name; keywords are its settings.

    Args:
        name: Name in configurations.
        renormalize: Whether ``log_p`` is renormalised over the draft vocabulary if an objective's ``renormalize`` is
            null. False for a divergence that means a probability of acceptance.

    Raises:
        ValueError: Another function has the name.

    Example:
        >>> @register_divergence("squared_distance")
        ... def squared_distance(log_p, log_q):
        ...     return (log_p.exp() - log_q.exp()).square().sum(-1)
        >>> get_divergence("squared_distance")(torch.tensor([0.5, 0.5]).log(), torch.tensor([1.0, 0.0]).log())
        tensor(0.5000)
    """

    def register(function: _D) -> _D:
        if not renormalize:
            _ACCEPTANCE.add(function)
        return DIVERGENCES.register(name)(function)

    return register


_expect = torch.linalg.vecdot  # Σ p · values in one pass


@register_divergence("forward_kl")
def forward_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = Σ p (log p − log q). It is finite whatever ``p`` excludes: only tokens of ``p`` are asked for.

    Gradient: ``q_i Σp − p_i``.

    Source: Hinton et al. 2015 (arXiv 1503.02531); the objective of EAGLE-3 and Aurora.

    Example:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> forward_kl(half, half).item()
        0.0
    """
    log_p = log_p.detach()
    p = log_p.exp()
    # Two sums and no difference of rows: half the memory to write.
    return _expect(p, log_p.clamp(min=_NEVER)) - _expect(p, log_q)


@register_divergence("reverse_kl")
def reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) = Σ q (log q − log p): it seeks a mode of ``p``.

    Gradient: ``q_i (log q_i − log p_i − KL)``. A token that min-p, top-k or top-p excludes costs ``1e4`` nats
    times its ``q``, which outweighs all else until ``q`` has left it.

    Source: Gu et al. 2024, MiniLLM (arXiv 2306.08543); for drafters OSD (arXiv 2310.07177).

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> torch.allclose(reverse_kl(p, q), forward_kl(q, p))
        True
    """
    return _expect(log_q.exp(), log_q - log_p.detach().clamp(min=_NEVER))


@register_divergence("jensen_shannon")
def jensen_shannon(log_p: Tensor, log_q: Tensor, beta: float = 0.5) -> Tensor:
    """β KL(p || m) + (1 − β) KL(q || m) with m = β p + (1 − β) q: bounded, and 0 only at p = q.

    Gradient: ``(1 − β) q_i (log(q_i / m_i) − KL(q || m))``. On tokens that ``p`` excludes it stays bounded. Divided by
    β it tends to the forward KL as β → 0.

    Source: Agarwal et al. 2024, GKD (arXiv 2306.13649).

    Raises:
        ValueError: β outside (0, 1).

    Example:
        >>> p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log()
        >>> jensen_shannon(p, q.clamp(min=-50)).exp().item()  # the most that two distributions can differ by
        2.0
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must lie in (0, 1), got {beta}")
    log_p = log_p.detach().clamp(min=_NEVER)
    p, q = log_p.exp(), log_q.exp()
    log_m = (beta * p + (1 - beta) * q).clamp(min=torch.finfo(q.dtype).tiny).log()
    return beta * _expect(p, log_p - log_m) + (1 - beta) * _expect(q, log_q - log_m)


@register_divergence("skewed_kl")
def skewed_kl(log_p: Tensor, log_q: Tensor, skew: float = 0.1) -> Tensor:
    """KL(p || m) with m = λ p + (1 − λ) q, λ = ``skew``: a forward KL of at most ``−log λ``, however small ``q``.

    Gradient: ``(1 − λ) q_i (Σ q p / m − p_i / m_i)``. As in the forward KL, tokens that ``p`` excludes ask for nothing.

    Source: Ko et al. 2024, DistiLLM (arXiv 2402.03898).

    Raises:
        ValueError: λ outside [0, 1).

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> bool(skewed_kl(p, q) < forward_kl(p, q))
        True
    """
    if not 0 <= skew < 1:
        raise ValueError(f"skew must lie in [0, 1), got {skew}")
    log_p = log_p.detach().clamp(min=_NEVER)
    p = log_p.exp()
    mixed = skew * p + (1 - skew) * log_q.exp()
    return _expect(p, log_p - mixed.clamp(min=torch.finfo(p.dtype).tiny).log())


def overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """α = Σ min(p, q), the probability that rejection sampling accepts a draft from ``q`` where p is not renormalised.

    A metric, not to minimise.

    Gradient: ``q_i (1[q_i < p_i] − s)``, that of REINFORCE with the indicator as reward. It is 0 where the supports are
    disjoint.

    Source: Leviathan et al. 2023 (arXiv 2211.17192).

    Example:
        >>> overlap(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).item()
        0.75
    """
    return torch.minimum(log_p.detach(), log_q).exp().sum(-1)


@register_divergence("total_variation", renormalize=False)
def total_variation(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 − α: the probability of a rejection; for two distributions half their L1 distance.

    Gradient: ``−q_i (1[q_i < p_i] − s)``. No entry exceeds α: where supports hardly meet it teaches next to nothing.
    What ``q`` has on tokens that min-p, top-k or top-p exclude is rejected, and moves to those that are left.

    Source: Leviathan et al. 2023 (arXiv 2211.17192), as the rate of rejection.

    Example:
        >>> total_variation(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).item()
        0.25
    """
    return 1 - overlap(log_p, log_q)


@register_divergence("negative_log_overlap", renormalize=False)
def negative_log_overlap(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−log α: unlike total variation, it does not forget bad positions. For a point mass it is the cross entropy.

    Gradient: ``−q_i (1[q_i < p_i] − s) / α``, that of total variation over α. Supports that do not meet at all cost
    about ``1e4`` nats and teach nothing.

    Source: "LK-α" of arXiv 2602.23881.

    Example:
        >>> negative_log_overlap(torch.tensor([0.0, -torch.inf]), torch.tensor([0.25, 0.75]).log()).exp().item()
        4.0
    """
    # In logarithms a small α keeps its gradient.
    return -torch.minimum(log_p.detach(), log_q).clamp(min=_NEVER).logsumexp(-1)


@register_divergence("hybrid_overlap", renormalize=False)
def hybrid_overlap(log_p: Tensor, log_q: Tensor, decay: float = 3.0) -> Tensor:
    """KL far from ``p``, total variation near: w KL(p || q) + (1 − w)(1 − α), w = exp(−decay · α) held constant.

    Gradient: ``w (q_i Σp − p_i) − (1 − w) q_i (1[q_i < p_i] − s)``. Where supports are disjoint it is the forward KL's.

    Source: "LK-λ" of arXiv 2602.23881, with the overlap of each position.

    Raises:
        ValueError: ``decay`` negative or infinite.

    Example:
        >>> half = torch.tensor([0.5, 0.5]).log()
        >>> hybrid_overlap(half, half).item()
        0.0
    """
    if not 0 <= decay < math.inf:
        raise ValueError(f"decay must be finite and not negative, got {decay}")
    variation = total_variation(log_p, log_q)
    weight = torch.exp(-decay * (1 - variation.detach()))
    return weight * forward_kl(log_p, log_q) + (1 - weight) * variation


@register_divergence("cross_entropy")
def cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    """−log q(argmax p): what greedy verification accepts is the target's choice alone.

    The choice is that among the draft vocabulary's tokens, in both conventions: where the target's own has no row, the
    best that has is taught, though it would be rejected. Temperature, min-p, top-k and top-p of ``p`` change nothing.

    Gradient: ``q_i − 1[i = argmax p]``.

    Source: textbook; Medusa (arXiv 2401.10774) trains its heads by that of the text.

    Example:
        >>> cross_entropy(torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()).exp().item()
        2.0
    """
    best = log_p.max(-1, keepdim=True)
    # Values that are not numbers have no largest.
    return torch.where(best.values.isnan(), torch.nan, -log_q.gather(-1, best.indices))[..., 0]


@register_divergence("top_k_cross_entropy")
def top_k_cross_entropy(log_p: Tensor, log_q: Tensor, k: int = 10) -> Tensor:
    """−Σ p log q over the ``k`` likeliest tokens of ``p`` among the draft vocabulary's.

    Gradient: ``q_i P − p_i 1[i in top k]`` with ``P`` their mass: the forward KL's, where ``p`` has no more than ``k``
    tokens that min-p, top-k and top-p leave. Those that they exclude have weight 0, among the ``k`` too.

    Source: Zhang et al. 2025, HASS (arXiv 2408.15766).

    Raises:
        ValueError: ``k`` < 1.

    Example:
        >>> p, q = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.25, 0.25, 0.5]).log()
        >>> torch.allclose(top_k_cross_entropy(p, q, k=1), 0.5 * cross_entropy(p, q))
        True
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    best, index = log_p.detach().topk(min(k, log_p.shape[-1]), dim=-1)
    return -_expect(best.exp(), log_q.gather(-1, index))


@register_divergence("missed_probability", renormalize=False)
def missed_probability(log_p: Tensor, log_q: Tensor) -> Tensor:
    """1 − Σ p q: the probability that a draft sampled from ``q`` is not the token that the target draws.

    What sample-and-match and target-only verification reject, where p is not renormalised; renormalised, given that the
    target draws a token that has a row. Its optimum is all mass on argmax p: calibration is worth nothing under these
    rules.

    Gradient: ``−q_i (p_i − Σ p q)``. It is 0 where the supports are disjoint. A token that min-p, top-k or top-p
    excludes is a miss; a lower temperature of ``p`` only sharpens what is wanted anyway.

    Source: no paper; it is read off the rules (``aurora_rl.envs.verification.rules``).

    Example:
        >>> missed_probability(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()).item()
        0.5
    """
    return 1 - _expect(log_p.detach().exp(), log_q.exp())


def get_divergence(divergence: str | Mapping[str, Any] | Divergence) -> Divergence:
    """Return the divergence of a name, or of a name and settings; a function is returned as it is.

    A name is that of a registered divergence, of an entry point, or ``package.module:function``.

    Raises:
        ValueError: An unknown name or setting, or a value out of range; the message names the nearest or what is right.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
        >>> get_divergence({"name": "top_k_cross_entropy", "k": 1})(p, q) == top_k_cross_entropy(p, q, k=1)
        tensor(True)
    """
    if callable(divergence):
        return divergence
    settings = {"name": divergence} if isinstance(divergence, str) else dict(divergence)
    name = settings.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"a divergence needs a name, got {divergence}")
    function, what = DIVERGENCES.get(name), f"divergence {name!r}"
    check_values(settings, {k: v for k, v in settings_of(function).items() if k not in ("log_p", "log_q")}, what)
    chosen = partial(function, **settings) if settings else function
    try:
        shape = list(chosen(*torch.full((2, 2, _TRIED), -math.log(_TRIED))).shape)  # better than at the first batch
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: {error}") from error
    except Exception as error:  # whatever a function does
        raise ValueError(f"{what} fails on [2, {_TRIED}] log-probabilities: {type(error).__name__}: {error}") from error
    if shape != [2]:
        raise ValueError(f"{what} must give [...] of log-probabilities [..., Vd], got {shape} of [2, {_TRIED}]")
    return chosen


def with_gradient(divergence: Divergence) -> Divergence | ClosedForm:
    """Return a divergence with its gradient written down, for ``two_head_loss``, or itself if it has no such form.

    Example:
        >>> type(with_gradient(get_divergence({"name": "jensen_shannon", "beta": 0.1}))).__name__
        'ClosedForm'
        >>> with_gradient(top_k_cross_entropy) is top_k_cross_entropy
        True
    """
    whole = divergence if isinstance(divergence, partial) else partial(divergence)
    name = next((name for name in CLOSED_FORMS if DIVERGENCES.get(name) is whole.func), None)
    return divergence if name is None or whole.args else closed_form(name, **whole.keywords)


def wants_renormalized(divergence: Divergence) -> bool:
    """Return whether ``log_p`` is renormalised by default: not for divergences that mean a probability of acceptance.

    Example:
        >>> wants_renormalized(forward_kl), wants_renormalized(get_divergence({"name": "hybrid_overlap", "decay": 1.0}))
        (True, False)
    """
    return (divergence.func if isinstance(divergence, partial) else divergence) not in _ACCEPTANCE

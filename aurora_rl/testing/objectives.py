"""check_objective: the promises of every objective, checked on a tiny model served in process and on tables."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.utils import NestedKey
from torch import Tensor

from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import OBJECTIVES, Objective
from aurora_rl.objectives.function_objective import objective_from_function
from aurora_rl.policies import TargetParts
from aurora_rl.testing.asserts import refuses, require, total_loss, total_of
from aurora_rl.testing.estimators import check_expected_gradient
from aurora_rl.testing.fixtures import EchoDrafter, GappyDrafter, gappy_drafter, served_for_checks
from aurora_rl.testing.tiny import tiny_target
from aurora_rl.testing.variants import siblings_reversed, topk_form
from aurora_rl.trajectories import pack

# Of central differences at this step in float64, against the gradient along random directions. So short that the kinks
# of an overlap, min(p, q), hardly ever lie within it; rounding is at 1e-8.
_STEP, _RELATIVE = 1e-7, 1e-4
# What a request could have been served with in place of the first of these.
_SERVED_OTHERWISE = {"temperature": 1.5, "top_k": 1, "top_p": 0.3, "min_p": 0.9}
# On the target's logits: where it is all but certain, objectives that ask for all of p and for its argmax alone agree.
_SHARPER = 4.0


def check_objective(
    make: str | Callable[..., Any],
    *,
    differentiable: bool = True,
    unbiased: bool = True,
    leads: bool = True,
    seed: int = 0,
) -> None:
    """Check the promises that a learner relies on; raises AssertionError naming the one that is broken.

    A tiny target is served with an EAGLE-3 drafter under sample-and-match, greedily, and by chains under rejection,
    which an objective may refuse by a ValueError that names it. Trees are by top-k, or drawn at random for an objective
    that declares so (``Objective.sampled``). docs/extending.md lists the promises. How a loss changes with acceptance
    is not checked: imitation does not look at it.

    The value of a sampled objective tells nothing about its direction. So its expected gradient is checked over all
    trees and outcomes of tables (``aurora_rl.testing.enumerable_worlds``). The drafter that ``make`` receives is then
    such a table, which scores trees and cannot unroll.

    Args:
        make: The objective: its name, an import path ``package.module:Thing``, its class, or its function of
            ``log_p``, ``log_q`` and windows. With settings it is a partial of its class or function, or a function that
            is called with a drafter, the target's head and ``reduction=...`` and returns the objective.
        differentiable: False for an objective that holds a part of itself constant, such as a weight, so that its
            gradient is not the derivative of its value.
        unbiased: False for a sampled objective that is biased on purpose, as by standardised rewards: then its
            expected gradient need only have a positive cosine with the right one.
        leads: False for a term that is only meant to be summed with another, such as a regulariser, and does not by
            itself lead to the target.
        seed: Seed of weights, prompts and completions.

    Raises:
        AssertionError: A promise is broken; the message names it.
        ValueError: ``make`` is no objective, or nothing has its name.

    Example:
        >>> check_objective("imitation")
    """
    make = _maker(make)
    parts = TargetParts.of(tiny_target())
    drafter = gappy_drafter(parts, seed)

    def objective(reduction: str = "mean") -> Objective:
        return make(drafter, parts.head, reduction=reduction)

    sampled = objective().sampled
    # Copies: an objective that changes what it is given must not spoil the next check.
    first, *rest = copy.deepcopy(served_for_checks(seed, sampled=sampled))
    learns = False
    for served in (first, *rest):
        batch = pack(served.trajectories)
        if served is not first and refuses(objective(), batch, f"a batch {served.how}"):
            continue
        try:
            _check_forward(objective(), batch)
            _check_gaps(objective("sum"), drafter, batch)
            learns |= _check_gradient(objective(), batch, differences=differentiable and not sampled, seed=seed)
            _check_reductions(objective, served.trajectories)
            _check_forms(objective("none"), served.trajectories)
        except AssertionError as error:
            raise AssertionError(f"{error} ({served.how})") from error
    require(learns, "no gradient reaches the drafter")  # in one batch there may be no reward
    if not sampled:
        _check_siblings(objective("sum"), first.trajectories)
    _check_sampling(objective(), pack(first.trajectories))
    _check_extremes(objective(), first.trajectories)
    if leads and sampled:
        check_expected_gradient(make, unbiased=unbiased, seed=seed)
    elif leads:
        _check_direction(make, parts, pack(first.trajectories))


def _maker(make: str | Callable[..., Any]) -> Callable[..., Objective]:
    """Return what is called with drafter, head and ``reduction=...`` to make the objective."""
    if isinstance(make, str):
        return OBJECTIVES.get(make)
    if not callable(make) or (isinstance(make, type) and not issubclass(make, Objective)):
        raise ValueError(
            f"an objective is its name, 'package.module:Thing', its class, its function, or a function of drafter, "
            f"head and reduction that makes it; got {make!r}"
        )
    if isinstance(make, functools.partial) and not make.args:
        return functools.partial(_maker(make.func), **make.keywords)
    if not inspect.isfunction(make):
        return make
    parameters = inspect.signature(make).parameters
    if "reduction" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return make
    name = OBJECTIVES.name_of(make)
    return OBJECTIVES.get(name) if name in OBJECTIVES else objective_from_function(make.__name__, make)


def _check_forward(objective: Objective, batch: TensorDict) -> None:
    before = batch.clone()
    out = objective(batch)
    keys = list(before.keys(True, True))
    same = set(batch.keys(True, True)) == set(keys) and all(torch.equal(batch[k], before[k]) for k in keys)
    require(same, "forward changes its input")
    require(f"loss_{objective.name}" in out.keys(), f"forward returns no 'loss_{objective.name}'")
    declared = set(out.keys()) == set(objective.out_keys)
    require(declared, f"out_keys are {objective.out_keys}, forward gave {[*out.keys()]}")
    for key, value in out.items():
        require(bool(torch.isfinite(value).all()), f"{key} is not finite")
        require(value.requires_grad == key.startswith("loss_"), f"{key}: losses carry gradients and metrics do not")
    require(out[f"loss_{objective.name}"].ndim == 0, "the mean of a loss is not a scalar")
    told = {(key,) if isinstance(key, str) else tuple(key) for key in objective.in_keys}
    known = {(key,) if isinstance(key, str) else tuple(key) for key in keys}
    require(told <= known, f"in_keys name {sorted(told - known)}, which no batch has")
    _check_keys(objective, batch, objective.in_keys, total_of(out), "in_keys")


def _check_keys(objective: Objective, batch: TensorDict, keys: list[NestedKey], total: Tensor, name: str) -> None:
    """Check that the loss of these entries alone is ``total``, that of the whole batch."""
    try:
        alone = total_loss(objective, batch.select(*keys))
    except (KeyError, ValueError) as error:
        raise AssertionError(f"{name} miss an entry that is read: {error}") from error
    require(torch.equal(alone, total), f"{name} miss entries that count")


def _check_gaps(objective: Objective, drafter: GappyDrafter, batch: TensorDict) -> None:
    found, gradients = [], []
    for filler in (0.0, 1.0):
        drafter.filler = filler
        found.append(objective(batch))
        gradients.append(_gradient(objective, total_of(found[-1])))
    drafter.filler = 0.0
    for key, value in found[0].items():
        what = "the loss" if key.startswith("loss_") else f"the metric {key!r}"
        same = torch.allclose(value, found[1][key])
        require(same, f"{what} depends on what stands where the drafter has no prediction")
    same = all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))
    require(same, "the gradient depends on what stands where the drafter has no prediction")


def _parameters(objective: Objective) -> list[Tensor]:
    return [p for p in objective.drafter.parameters() if p.requires_grad]


def _gradient(objective: Objective, loss: Tensor) -> list[Tensor]:
    parameters = _parameters(objective)
    gradient = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradient, strict=True)]


def _check_gradient(objective: Objective, batch: TensorDict, *, differences: bool, seed: int) -> bool:
    """Check the gradient against finite differences. Return whether there is any."""
    require(not any(t.requires_grad for t in objective.head.tensors().values()), "the target's head would learn")
    parameters, found = _parameters(objective), _gradient(objective, total_loss(objective, batch))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2 if differences else 0):
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = float(sum((g * d).sum() for g, d in zip(found, direction, strict=True)))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * _STEP)
                ends.append(float(total_loss(objective, batch)))
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * _STEP)
        measured = (ends[0] - ends[1]) / (2 * _STEP)
        near = abs(measured - slope) <= _RELATIVE * max(abs(slope), 1.0)
        require(near, f"the gradient along a direction is {slope:.6g}, finite differences give {measured:.6g}")
    return any(bool(g.any()) for g in found)


def _check_reductions(objective: Callable[[str], Objective], trajectories: list[TensorDict]) -> None:
    every = pack(trajectories)
    total = total_loss(objective("sum"), every)
    apart = objective("none")
    out, counted = apart(every), apart.values(every).valid.sum(1).clamp(min=1)
    require(torch.allclose(total_of(out), total), "the values of 'none' do not add up to 'sum'")
    mean = (out[f"loss_{apart.name}"].sum(1) / counted).sum()
    same = torch.allclose(total_loss(objective("mean"), every), mean)
    require(same, "'mean' is not the mean of each group over its valid positions, summed over the groups")
    alone = torch.stack([total_loss(objective("sum"), pack([t])) for t in trajectories]).sum()
    require(torch.allclose(alone, total), "a trajectory counts differently alone and next to others: padding is read")
    turned = total_loss(objective("sum"), pack(trajectories[::-1]))
    require(torch.allclose(turned, total), "the order of the trajectories matters")


def _check_forms(objective: Objective, trajectories: list[TensorDict]) -> None:
    """Check that the top-k form of all tokens gives the loss of hidden states."""
    likeliest = pack([topk_form(t, objective.head, len(objective.head)) for t in trajectories])
    if refuses(objective, likeliest, "a batch with the target's likeliest tokens", naming="hidden"):
        return
    total = total_loss(objective, likeliest)
    same = torch.allclose(total, total_loss(objective, pack(trajectories)))
    require(same, "the target's likeliest tokens and its hidden states give different losses")
    _check_keys(objective, likeliest, objective.keys_of(likeliest), total, "keys_of a batch with the likeliest tokens")


def _check_siblings(objective: Objective, trajectories: list[TensorDict]) -> None:
    turned = [siblings_reversed(t) for t in trajectories]
    same = torch.allclose(total_loss(objective, pack(turned)), total_loss(objective, pack(trajectories)))
    require(same, "the order of siblings matters, under a rule to which it does not")


def _check_sampling(objective: Objective, batch: TensorDict) -> None:
    before = objective(batch)
    for name, value in _SERVED_OTHERWISE.items():
        if ("sampling", name) in objective.in_keys:
            changed = batch.clone()
            changed["sampling", name].fill_(value)
            after = objective(changed)
            same = all(torch.equal(after[key], before[key]) for key in before.keys())
            require(not same, f"in_keys name ('sampling', {name!r}), and nothing changes with it")


def _check_extremes(objective: Objective, trajectories: list[TensorDict]) -> None:
    for accepted, what in ((False, "nothing was accepted"), (True, "every node was accepted")):
        batch = pack(trajectories)
        batch["nodes", "accepted"].fill_(accepted)
        total = total_loss(objective, batch)
        require(bool(torch.isfinite(total)), f"the loss is {float(total.detach())} where {what}")
        finite = all(bool(torch.isfinite(g).all()) for g in _gradient(objective, total))
        require(finite, f"a gradient is not finite where {what}")


def _check_direction(make: Callable[..., Objective], parts: TargetParts, batch: TensorDict) -> None:
    drafter = EchoDrafter.from_target(parts, draft_vocab=torch.arange(0, len(parts.head), 2)).double()
    drafter.head = _SHARPER * parts.head.weight

    def losses(factor: float) -> Tensor:
        """Return the loss of every group, ``[G]``."""
        drafter.factor = factor
        objective = make(drafter, TargetHead(drafter.head), reduction="none")
        return objective(batch)[f"loss_{objective.name}"].detach().sum(1)

    for group, (target, even, contrary) in enumerate(zip(losses(1), losses(0), losses(-1), strict=True)):
        nothing = not (target or even or contrary)  # no valid position
        require(
            nothing or bool(target < min(even, contrary)),
            f"it does not lead to the target: in group {group} the loss of a drafter that is the target is "
            f"{target:.4g}, of one that says nothing {even:.4g}, of one that says the contrary {contrary:.4g}",
        )

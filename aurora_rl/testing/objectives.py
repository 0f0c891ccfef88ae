"""check_objective: what every objective promises, on a tiny model served in process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import Objective
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing.asserts import require
from aurora_rl.testing.forms import topk_form
from aurora_rl.testing.tiny import serve, tiny_target
from aurora_rl.trajectories import pack
from aurora_rl.trees import depth_first

# Of central differences at this step in float64, against the gradient along random directions.
_STEP, _RELATIVE = 1e-5, 1e-4


def check_objective(
    make: Callable[[Drafter, Tensor, str], Objective], *, differentiable: bool = True, seed: int = 0
) -> None:
    """Check the promises that a learner relies on; raises AssertionError naming the one that is broken.

    A tiny target is served with an EAGLE-3 drafter: trees by top-k, or chains drawn at random for an objective that
    declares so (``Objective.sampled``), under sample-and-match.

    Args:
        make: given a drafter, the target's head and a reduction, the objective.
        differentiable: False for an objective that holds a part of itself constant, such as a weight, so that its
            gradient is not the derivative of its value.
        seed: of weights, prompts and completions.

    Raises:
        AssertionError: names the promise that is broken.

    Example:
        >>> from aurora_rl.objectives import ImitationLoss
        >>> check_objective(lambda drafter, head, reduction: ImitationLoss(drafter, head, reduction=reduction))
    """
    torch.manual_seed(seed)
    target = tiny_target()
    parts = TargetParts.of(target)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, len(parts.head), 2)).double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)

    def objective(reduction: str = "mean") -> Objective:
        return make(drafter, parts.head, reduction)

    mode = "sampled" if objective().sampled else "topk"
    prompts = [torch.randint(len(parts.head), (n,)) for n in (3, 1, 6)]
    trajectories = serve(
        drafter,
        target,
        prompts,
        shape=TreeShape(3, 2, mode=mode),
        max_new_tokens=8,
        num_slots=2,
        sampling=SamplingParams(temperature=1.0, seed=seed),
    )
    batch = pack(trajectories)
    _check_forward(objective(), batch)
    # A score function is not the derivative of its value either.
    _check_gradient(objective(), batch, differences=differentiable and not objective().sampled)
    _check_reductions(objective, trajectories)
    if not objective().sampled:  # what hangs on a draw are its later siblings too
        _check_siblings(objective("sum"), trajectories)
    _check_extremes(objective(), trajectories)
    _check_forms(objective("none"), trajectories)


def _total(objective: Objective, batch: TensorDict) -> Tensor:
    return torch.stack([value.sum() for key, value in objective(batch).items() if key.startswith("loss_")]).sum()


def _check_forward(objective: Objective, batch: TensorDict) -> None:
    before = batch.clone()
    out = objective(batch)
    keys = list(before.keys(True, True))
    require(
        set(batch.keys(True, True)) == set(keys) and all(torch.equal(batch[k], before[k]) for k in keys),
        "forward changes its input",
    )
    require(f"loss_{objective.name}" in out.keys(), f"forward returns no 'loss_{objective.name}'")
    require(
        set(out.keys()) == set(objective.out_keys), f"out_keys are {objective.out_keys}, forward gave {[*out.keys()]}"
    )
    for key, value in out.items():
        require(bool(torch.isfinite(value).all()), f"{key} is not finite")
        require(value.requires_grad == key.startswith("loss_"), f"{key}: losses carry gradients and metrics do not")
    require(out[f"loss_{objective.name}"].ndim == 0, "the mean of a loss is not a scalar")
    told = {(key,) if isinstance(key, str) else tuple(key) for key in objective.in_keys}
    known = {(key,) if isinstance(key, str) else tuple(key) for key in keys}
    require(told <= known, f"in_keys name {sorted(told - known)}, which no batch has")
    require(
        torch.equal(_total(objective, batch.select(*told)), _total(objective, batch)), "in_keys miss entries that count"
    )


def _check_gradient(objective: Objective, batch: TensorDict, *, differences: bool) -> None:
    parameters = [p for p in objective.drafter.parameters() if p.requires_grad]
    require(not objective.head.requires_grad, "the target's head would learn")
    gradient = torch.autograd.grad(_total(objective, batch), parameters, allow_unused=True)
    found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradient, strict=True)]
    require(any(bool(g.any()) for g in found), "no gradient reaches the drafter")
    for _ in range(3 if differences else 0):
        direction = [torch.randn_like(p) for p in parameters]
        slope = float(sum((g * d).sum() for g, d in zip(found, direction, strict=True)))
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(d, alpha=sign * _STEP)
                ends.append(float(_total(objective, batch)))
                for p, d in zip(parameters, direction, strict=True):
                    p.sub_(d, alpha=sign * _STEP)
        measured = (ends[0] - ends[1]) / (2 * _STEP)
        require(
            abs(measured - slope) <= _RELATIVE * max(abs(slope), 1.0),
            f"the gradient along a direction is {slope:.6g}, finite differences give {measured:.6g}",
        )


def _check_forms(objective: Objective, trajectories: list[TensorDict]) -> None:
    """With every token among the likeliest, the top-k form says what hidden states say."""
    likeliest = pack([topk_form(t, objective.head, len(objective.head)) for t in trajectories])
    try:
        got = objective(likeliest)
    except (KeyError, ValueError):
        return  # it names what it needs
    expected = objective(pack(trajectories))
    require(
        all(torch.allclose(got[key], expected[key]) for key in expected.keys() if key.startswith("loss_")),
        "the target's likeliest tokens and its hidden states give different losses",
    )
    told = objective.keys_of(likeliest)
    require(torch.equal(_total(objective, likeliest.select(*told)), _total(objective, likeliest)), "keys_of misses one")


def _check_reductions(objective: Callable[[str], Objective], trajectories: list[TensorDict]) -> None:
    every = pack(trajectories)
    total = _total(objective("sum"), every)
    require(torch.allclose(_total(objective("none"), every), total), "the values of 'none' do not add up to 'sum'")
    alone = torch.stack([_total(objective("sum"), pack([t])) for t in trajectories]).sum()
    require(torch.allclose(alone, total), "a trajectory counts differently alone and beside others: padding is read")
    turned = _total(objective("sum"), pack(trajectories[::-1]))
    require(torch.allclose(turned, total), "the order of the trajectories matters")


def _check_siblings(objective: Objective, trajectories: list[TensorDict]) -> None:
    turned = [_turned(t) for t in trajectories]
    require(
        torch.allclose(_total(objective, pack(turned)), _total(objective, pack(trajectories))),
        "the order of siblings matters, under a rule to which it does not",
    )


def _turned(trajectory: TensorDict) -> TensorDict:
    """The same trees with siblings in reverse order."""
    out, offset = trajectory.clone(), trajectory["rounds", "offset"].tolist()
    for first, last in zip(offset, offset[1:], strict=False):
        parents, count = trajectory["nodes", "parents"][first:last], last - first
        # Nodes counted from the end keep children behind parents only depth by depth: visit them in that order.
        order = _reversed_depth_first(parents)
        place = torch.full((count + 1,), -1)
        place[order] = torch.arange(count)
        for key in ("tokens", "log_probs", "accepted", "hidden"):
            out["nodes", key][first:last] = trajectory["nodes", key][first:last][order]
        out["nodes", "parents"][first:last] = place[parents[order]]
    return out


def _reversed_depth_first(parents: Tensor) -> Tensor:
    """Depth-first order in which children come in reverse."""
    order = depth_first(parents).tolist()
    children: dict[int, list[int]] = {}
    for node in order:
        children.setdefault(int(parents[node]), []).append(node)
    out: list[int] = []

    def visit(node: int) -> None:
        for child in reversed(children.get(node, [])):
            out.append(child)
            visit(child)

    visit(-1)
    return torch.tensor(out, dtype=torch.int64)


def _check_extremes(objective: Objective, trajectories: list[TensorDict]) -> None:
    for accepted, what in ((False, "nothing was accepted"), (True, "every node was accepted")):
        batch = pack(trajectories)
        batch["nodes", "accepted"] = torch.full_like(batch["nodes", "accepted"], accepted)
        total = _total(objective, batch)
        require(bool(torch.isfinite(total)), f"the loss is {float(total.detach())} where {what}")
        total.backward()
        finite = all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in objective.drafter.parameters())
        require(finite, f"a gradient is not finite where {what}")
        objective.zero_grad()

"""The exact gradient of the expected accepted length, and the mean of the loss's over all trees and outcomes."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.objectives import AcceptanceRewardLoss
from aurora_rl.testing.enumerable_worlds import (
    DrawnTree,
    EnumerableDrafter,
    EnumerableTarget,
    chance_of,
    drawn_trees,
    exact_gradient,
    expectation,
    log_probs_of,
    outcomes_of,
    reach_of,
    table_gradient,
    tree_trajectory,
)
from aurora_rl.trajectories import pack

CHAIN2, CHAIN3, BRANCHES, BUSH = (-1, 0), (-1, 0, 1), (-1, -1, 0, 1), (-1, -1, -1)
SERVED = [
    ("sample_and_match", "sampled", 1.0),
    ("sample_and_match", "sampled", 0.5),
    ("greedy", "sampled", 0.0),
    ("rejection", "sampled", 1.0),
    ("rejection", "sampled", 0.0),
    ("sample_and_match", "sampled_without_replacement", 1.0),
    ("rejection_without_replacement", "sampled_without_replacement", 1.0),
    ("rejection_without_replacement", "sampled", 1.0),
]


def exact(
    drafter: EnumerableDrafter, target: EnumerableTarget, parents: tuple[int, ...], rule: str, mode: str
) -> Tensor:
    """Gradient of the expected number of accepted nodes."""
    distinct = mode == "sampled_without_replacement"
    return exact_gradient(drafter, target, parents, rule=rule, distinct=distinct)[1]


def estimated(
    drafter: EnumerableDrafter,
    target: EnumerableTarget,
    parents: tuple[int, ...],
    rule: str,
    mode: str,
    bits: bool = False,
    drew: EnumerableDrafter | None = None,
    **settings,
) -> Tensor:
    """Minus the expected gradient of the loss, over all trees and, with ``bits``, all outcomes.

    ``drew`` is what drew and recorded the trees, where that is not the drafter itself.
    """
    distinct, items, drew = mode == "sampled_without_replacement", [], drew or drafter
    for tree in drawn_trees(parents, distinct):
        drawn, log_probs = chance_of(drew, tree, distinct).detach(), log_probs_of(drew, tree)
        outcomes = outcomes_of(tree, reach_of(drew, target, tree, rule)) if bits else [(None, torch.ones(()))]
        items += [
            (tree_trajectory(tree, target, rule=rule, mode=mode, accepted=a, log_probs=log_probs), drawn * w)
            for a, w in outcomes
        ]
    loss = AcceptanceRewardLoss(drafter, target.head, reduction="none", **settings)
    return -table_gradient(drafter, expectation(items, loss))


def one_tree(
    drafter: EnumerableDrafter,
    target: EnumerableTarget,
    tree: DrawnTree,
    rule: str,
    drew: EnumerableDrafter | None = None,
    **kw,
) -> TensorDict:
    """A batch of one tree, as ``drew`` or the drafter itself recorded it."""
    return pack([tree_trajectory(tree, target, rule=rule, log_probs=log_probs_of(drew or drafter, tree), **kw)])

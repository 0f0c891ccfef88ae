"""Check the expected gradient of an objective on draws, by summing over every draw and every outcome."""

from __future__ import annotations

from collections.abc import Callable

import torch

from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import Objective
from aurora_rl.testing import enumerable_worlds as worlds
from aurora_rl.testing.asserts import refuses, require, total_loss
from aurora_rl.trajectories import pack

# Rule, draft mode and temperature. One that is neither 0 nor 1 tells who takes p as it was served.
_SERVED = (
    ("sample_and_match", "sampled", 0.7),
    ("greedy", "sampled", 0.0),
    ("rejection", "sampled", 0.7),
    ("rejection_without_replacement", "sampled_without_replacement", 0.7),
)
# A chain, and the smallest tree in which something hangs on a draw both below it and next to it.
_PARENTS = ((-1, 0), (-1, -1, 0))
# Sums of a few hundred terms in float64 differ by less.
_SAME = 1 - 1e-9
# A direction that may be biased must exceed this, which is more than what rounding leaves of a zero gradient.
_LEADS = 1e-3


def check_expected_gradient(make: Callable[..., Objective], *, unbiased: bool, seed: int) -> None:
    """Compare with the gradient of the expected number of accepted nodes, rule by rule, on tables.

    An objective may refuse a rule, a draft mode or a chain by a ValueError that names it.

    Arguments are those of :func:`~aurora_rl.testing.check_objective`.

    Raises:
        AssertionError: A direction is wrong, or everything is refused.
    """
    judged = 0
    for rule, mode, temperature in _SERVED:
        for parents in _PARENTS:
            drafter, target = worlds.EnumerableDrafter(seed), worlds.EnumerableTarget(seed, temperature)
            distinct, batches = mode == "sampled_without_replacement", []
            for tree in worlds.drawn_trees(parents, distinct):
                drawn = worlds.chance_of(drafter, tree, distinct).detach()
                log_probs = worlds.log_probs_of(drafter, tree)
                for accepted, follows in worlds.outcomes_of(tree, worlds.reach_of(drafter, target, tree, rule)):
                    if follows > 0:
                        trajectory = worlds.tree_trajectory(
                            tree, target, rule=rule, mode=mode, accepted=accepted, log_probs=log_probs
                        )
                        batches.append((pack([trajectory]), drawn * follows))
            objective = make(drafter, TargetHead(target.head), reduction="sum")
            what = f"trees {parents} served by {rule}"
            if refuses(objective, batches[0][0], what):
                continue
            judged += 1
            expected = torch.stack([chance * total_loss(objective, batch) for batch, chance in batches]).sum()
            _, truth = worlds.exact_gradient(drafter, target, parents, rule=rule, distinct=distinct)
            found = -worlds.table_gradient(drafter, expected)
            cosine = float(torch.cosine_similarity(found.flatten(), truth.flatten(), 0))
            require(
                cosine > (_SAME if unbiased else _LEADS),
                f"{what}: minus the expected gradient has a cosine of {cosine:.4f} with that of the expected number of "
                f"accepted nodes, not {'1' if unbiased else 'a positive one'}",
            )
    require(judged > 0, "every rule is refused")

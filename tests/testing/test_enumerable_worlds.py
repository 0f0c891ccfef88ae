"""Worlds of tables, against draws counted one by one and verification simulated by the library's own rules."""

from __future__ import annotations

import math

import pytest
import torch

from aurora_rl.objectives import AcceptanceRewardLoss
from aurora_rl.testing.enumerable_worlds import (
    VOCAB,
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
from aurora_rl.trajectories import validate

PARENTS = (-1, -1, 0)


@pytest.mark.parametrize("distinct", [False, True])
def test_every_tree_is_drawn_and_their_chances_sum_to_one(distinct: bool) -> None:
    drafter = EnumerableDrafter(0)
    trees = list(drawn_trees(PARENTS, distinct))
    assert len({tree.tokens for tree in trees}) == len(trees) == (3 * 2 * 3 if distinct else 3**3)
    assert abs(float(sum(chance_of(drafter, tree, distinct).detach() for tree in trees)) - 1) < 1e-12


def test_the_chance_of_a_tree_by_hand() -> None:
    drafter = EnumerableDrafter(0)
    tree = DrawnTree(PARENTS, (2, 0, 1))
    assert tree.texts == [(2,), (0,), (2, 1)] and tree.children(-1) == [0, 1] and tree.children(0) == [2]
    root, below = (drafter.log_q(text).exp().tolist() for text in ((), (2,)))
    assert math.isclose(float(chance_of(drafter, tree, False).detach()), root[2] * root[0] * below[1])
    assert math.isclose(float(chance_of(drafter, tree, True).detach()), root[2] * root[0] / (1 - root[2]) * below[1])
    assert torch.tensor(log_probs_of(drafter, tree)).exp().tolist() == pytest.approx([root[2], root[0], below[1]])


@pytest.mark.parametrize("rule", ["sample_and_match", "rejection", "rejection_without_replacement"])
def test_one_token_is_accepted_as_often_as_theory_says(rule: str) -> None:
    drafter, target = EnumerableDrafter(1), EnumerableTarget(1)
    p, q = target.p(()), drafter.log_q(()).exp().detach()
    value, _ = exact_gradient(drafter, target, (-1,), rule=rule, distinct=rule.endswith("replacement"))
    theory = (p * q).sum() if rule == "sample_and_match" else torch.minimum(p, q).sum()  # Leviathan et al. 2023
    torch.testing.assert_close(value, theory)


def test_a_greedy_target_accepts_its_likeliest_path_alone() -> None:
    drafter, target = EnumerableDrafter(2), EnumerableTarget(2, temperature=0.0)
    first = int(target.p(()).argmax())
    second = int(target.p((first,)).argmax())
    reached = reach_of(drafter, target, DrawnTree(PARENTS, (first, (first + 1) % VOCAB, second)), "greedy")
    assert [float(chance) for chance in reached] == [1.0, 0.0, 1.0]
    outcomes = [accepted for accepted, chance in outcomes_of(DrawnTree(PARENTS, (first, 0, second)), reached) if chance]
    assert outcomes == [[True, False, True]]


def test_outcomes_are_paths_from_the_root_and_their_chances_sum_to_one() -> None:
    drafter, target, tree = EnumerableDrafter(3), EnumerableTarget(3), DrawnTree(PARENTS, (0, 1, 2))
    outcomes = list(outcomes_of(tree, [chance.detach() for chance in reach_of(drafter, target, tree, "rejection")]))
    assert [accepted for accepted, _ in outcomes] == [
        [False, False, False],
        [True, False, False],
        [False, True, False],
        [True, False, True],
    ]
    assert abs(float(sum(chance for _, chance in outcomes)) - 1) < 1e-12


@pytest.mark.parametrize("rule", ["sample_and_match", "rejection"])
def test_the_exact_gradient_is_that_of_finite_differences(rule: str) -> None:
    drafter, target, step = EnumerableDrafter(4), EnumerableTarget(4), 1e-6
    _, gradient = exact_gradient(drafter, target, (-1, 0), rule=rule)
    for row, column in ((0, 0), (0, 2), (2, 1)):
        values = []
        for sign in (1, -1):
            start = drafter.table.detach().clone()
            start[row, column] += sign * step
            values.append(exact_gradient(EnumerableDrafter(4, start=start), target, (-1, 0), rule=rule)[0])
        assert abs(float((values[0] - values[1]) / (2 * step) - gradient[row, column])) < 1e-8
    assert not gradient[13:].any()  # texts of three tokens are below every node


def test_an_expectation_weighs_the_losses_of_trajectories() -> None:
    drafter, target = EnumerableDrafter(5), EnumerableTarget(5)
    trees = [DrawnTree((-1,), (token,)) for token in range(VOCAB)]
    items = [
        (tree_trajectory(tree, target, rule="sample_and_match", log_probs=log_probs_of(drafter, tree)), torch.tensor(w))
        for tree, w in zip(trees, (0.5, 0.3, 0.2), strict=True)
    ]
    for trajectory, _ in items:
        validate(trajectory, vocab_size=VOCAB, feature_size=1, hidden_size=VOCAB)
    loss = AcceptanceRewardLoss(drafter, target.head, reduction="none")
    each = [float(expectation([(trajectory, torch.tensor(1.0))], loss).detach()) for trajectory, _ in items]
    whole = expectation(items, loss)
    assert math.isclose(float(whole.detach()), 0.5 * each[0] + 0.3 * each[1] + 0.2 * each[2], rel_tol=1e-6)
    assert table_gradient(drafter, whole).shape == drafter.table.shape

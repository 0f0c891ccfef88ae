"""AcceptanceRewardLoss: its gradient, summed over all trees and outcomes, is that of the expected accepted length.

Drafter and target are tables over three tokens, the rules are followed by their definitions, and every tree that can be
drawn is. So a biased estimator shows to the last digit, and the well-known wrong ones have to.
"""

from __future__ import annotations

import pytest
import torch
from reward_estimates import BRANCHES, BUSH, CHAIN2, CHAIN3, SERVED, estimated, exact, one_tree
from torch import Tensor

from aurora_rl.objectives import AcceptanceRewardLoss
from aurora_rl.policies import TreeShape
from aurora_rl.testing.enumerable_worlds import (
    TEXTS,
    VOCAB,
    DrawnTree,
    EnumerableDrafter,
    EnumerableTarget,
    chance_of,
    drawn_trees,
    expectation,
    log_probs_of,
    outcomes_of,
    reach_of,
    table_gradient,
    tree_trajectory,
)
from aurora_rl.trajectories import pack


@pytest.mark.parametrize("parents", [CHAIN2, CHAIN3, BRANCHES, BUSH], ids=str)
@pytest.mark.parametrize(("rule", "mode", "temperature"), SERVED)
def test_unbiased_by_enumeration(parents: tuple[int, ...], rule: str, mode: str, temperature: float) -> None:
    drafter, target = EnumerableDrafter(0), EnumerableTarget(0, temperature)
    expected = exact(drafter, target, parents, rule, mode)
    # Three different tokens are all there are, and one of them is always accepted.
    certain = parents == BUSH and mode == "sampled_without_replacement"
    assert certain or expected.abs().max() > 1e-3
    torch.testing.assert_close(estimated(drafter, target, parents, rule, mode), expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("gap", [8.0, 18.0, 40.0])
@pytest.mark.parametrize("rule", ["sample_and_match", "rejection_without_replacement"])
def test_distinct_siblings_of_a_drafter_that_is_all_but_sure(rule: str, gap: float) -> None:
    """What the first sibling leaves is lost where it is taken from one."""
    start = torch.zeros(len(TEXTS), VOCAB, dtype=torch.float64)
    start[:, 0], start[:, 1] = gap, 0.5
    drafter, target, mode = EnumerableDrafter(0, start=start), EnumerableTarget(0), "sampled_without_replacement"
    assert gap < 18 or drafter.log_q(())[0].exp() > 1 - 1e-6
    expected = exact(drafter, target, (-1, -1), rule, mode)
    assert expected.abs().max() > 1e-2
    got = estimated(drafter, target, (-1, -1), rule, mode)
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("parents", [BRANCHES, BUSH], ids=str)
@pytest.mark.parametrize("bits", [False, True])
@pytest.mark.parametrize("rule", ["sample_and_match", "rejection"])
def test_leave_one_out_keeps_it_unbiased(parents: tuple[int, ...], rule: str, bits: bool) -> None:
    if bits and rule == "rejection":
        return
    drafter, target = EnumerableDrafter(1), EnumerableTarget(1)
    settings = {"baseline": "leave_one_out", "reward": "recorded" if bits else "expected"}
    got = estimated(drafter, target, parents, rule, "sampled", bits=bits, **settings)
    torch.testing.assert_close(got, exact(drafter, target, parents, rule, "sampled"), atol=1e-10, rtol=0)


@pytest.mark.parametrize("tokens", [(0, 2), (2, 0), (0, 1, 2), (2, 0, 1)], ids=str)
def test_leave_one_out_by_hand(tokens: tuple[int, ...]) -> None:
    """Of different siblings one is accepted, so each one's score is weighed with its p less the mean of the others'."""
    drafter, target = EnumerableDrafter(1), EnumerableTarget(1)
    batch = one_tree(drafter, target, DrawnTree((-1,) * len(tokens), tokens), "sample_and_match")
    loss = AcceptanceRewardLoss(drafter, target.head, baseline="leave_one_out")(batch)["loss_acceptance_reward"]
    p, log_q = target.p(()), drafter.log_q(())
    less = [p[t] - sum(p[u] for u in tokens if u != t) / (len(tokens) - 1) for t in tokens]
    expected = -sum(w * log_q[t] for w, t in zip(less, tokens, strict=True))
    torch.testing.assert_close(table_gradient(drafter, loss), table_gradient(drafter, expected), atol=1e-12, rtol=0)


def test_leave_one_out_by_hand_under_rejection() -> None:
    """Siblings compete there: a score is weighed with what hangs on it, less what the others would do as the first."""
    drafter, target = EnumerableDrafter(1), EnumerableTarget(1)
    tree = DrawnTree((-1, -1, -1), (0, 1, 2))
    batch = one_tree(drafter, target, tree, "rejection")
    reach = reach_of(drafter, target, tree, "rejection")
    log_q, alone = drafter.log_q(()), (target.p(()) / drafter.log_q(()).exp()).clamp(max=1).detach()
    sibling_mean = (alone.sum() - alone) / 2
    hanging = [sum(reach[j:]).detach() for j in range(3)]
    expected = -sum(log_q[j] * (hanging[j] - sibling_mean[j]) + reach[j] for j in range(3))
    loss = AcceptanceRewardLoss(drafter, target.head, baseline="leave_one_out")(batch)["loss_acceptance_reward"]
    torch.testing.assert_close(table_gradient(drafter, loss), table_gradient(drafter, expected), atol=1e-12, rtol=0)


def test_leave_one_out_takes_variance_away_where_the_target_is_undecided() -> None:
    """What siblings have accepted is nearly the same then, whichever they are."""
    drafter, target = EnumerableDrafter(2), EnumerableTarget(2, temperature=3.0)

    def variance(**settings: str) -> float:
        loss, mean, square = AcceptanceRewardLoss(drafter, target.head, **settings), 0.0, 0.0
        for tree in drawn_trees((-1, -1)):
            out = loss(one_tree(drafter, target, tree, "sample_and_match"))
            gradient = table_gradient(drafter, out["loss_acceptance_reward"])
            drawn = chance_of(drafter, tree, False).detach()
            mean, square = mean + drawn * gradient, square + drawn * (gradient**2).sum()
        return float(square - (mean**2).sum())

    assert variance(baseline="leave_one_out") < 0.5 * variance()


@pytest.mark.parametrize("parents", [CHAIN2, CHAIN3, BRANCHES], ids=str)
@pytest.mark.parametrize(("rule", "temperature"), [("sample_and_match", 1.0), ("greedy", 0.0)])
def test_accept_bits_are_right_where_acceptance_does_not_look_at_q(
    parents: tuple[int, ...], rule: str, temperature: float
) -> None:
    drafter, target = EnumerableDrafter(2), EnumerableTarget(2, temperature)
    got = estimated(drafter, target, parents, rule, "sampled", bits=True, reward="recorded")
    torch.testing.assert_close(got, exact(drafter, target, parents, rule, "sampled"), atol=1e-10, rtol=0)


@pytest.mark.parametrize("parents", [(-1,), CHAIN2, CHAIN3], ids=str)
def test_rejection_on_a_chain_counts_bits_where_q_is_below_p(parents: tuple[int, ...]) -> None:
    drafter, target = EnumerableDrafter(3), EnumerableTarget(3)
    expected = exact(drafter, target, parents, "rejection", "sampled")
    got = estimated(drafter, target, parents, "rejection", "sampled", bits=True, reward="recorded")
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    if len(parents) == 1:  # one token: minus the gradient of total variation
        q, p = drafter.log_q(()).exp(), target.p(())
        torch.testing.assert_close(expected, -table_gradient(drafter, (p - q).abs().sum() / 2), atol=1e-12, rtol=0)


def naive(parents: tuple[int, ...], reward: str) -> tuple[Tensor, Tensor]:
    """The estimators that suggest themselves under rejection, over all trees and outcomes, and the truth."""
    drafter, target = EnumerableDrafter(3), EnumerableTarget(3)
    total = torch.zeros((), dtype=torch.float64)
    for tree in drawn_trees(parents):
        scores = [drafter.log_q(tree.before(par))[tok] for par, tok in zip(tree.parents, tree.tokens, strict=True)]
        below = [
            bool(drafter.log_q(tree.before(par)).exp()[tok] < target.p(tree.before(par))[tok])
            for par, tok in zip(tree.parents, tree.tokens, strict=True)
        ]
        drawn = chance_of(drafter, tree, False).detach()
        for accepted, share in outcomes_of(tree, reach_of(drafter, target, tree, "rejection")):
            for j, score in enumerate(scores):
                to_go = {
                    "bits": sum(accepted[j:]),
                    "own bit": accepted[j],
                    "indicators": sum(b and all(accepted[:i]) for i, b in enumerate(below) if i >= j),
                }[reward]
                total = total + drawn * share * float(to_go) * score
    return table_gradient(drafter, total), exact(drafter, target, parents, "rejection", "sampled")


@pytest.mark.parametrize("parents", [CHAIN2, CHAIN3], ids=str)
@pytest.mark.parametrize("reward", ["bits", "own bit", "indicators"])
def test_the_rewards_that_suggest_themselves_are_biased_under_rejection(parents: tuple[int, ...], reward: str) -> None:
    wrong, truth = naive(parents, reward)
    assert (wrong - truth).abs().max() > 0.01


def test_samples_point_where_the_exact_gradient_does() -> None:
    """Cosine with the exact gradient grows with the number of trees."""
    drafter, target = EnumerableDrafter(4), EnumerableTarget(4)
    truth, generator = exact(drafter, target, BRANCHES, "sample_and_match", "sampled"), torch.Generator().manual_seed(0)
    every = list(drawn_trees(BRANCHES))
    law = torch.stack([chance_of(drafter, tree, False).detach() for tree in every])
    batch = pack([
        tree_trajectory(t, target, rule="sample_and_match", log_probs=log_probs_of(drafter, t)) for t in every
    ])  # fmt: skip

    def cosine(of_tree: Tensor, count: int) -> float:
        shares = [law.multinomial(count, True, generator=generator).bincount(minlength=len(every)) for _ in range(20)]
        estimates = torch.stack(shares).double() @ of_tree / count
        return float(torch.cosine_similarity(estimates, truth.flatten()[None]).mean())

    for settings in ({}, {"baseline": "leave_one_out"}):
        values = AcceptanceRewardLoss(drafter, target.head, reduction="none", **settings)(batch)
        of_tree = torch.stack([-table_gradient(drafter, v).flatten() for v in values["loss_acceptance_reward"][0]])
        found = [cosine(of_tree, n) for n in (10, 100, 1000)]
        assert found[0] < found[1] < found[2] and found[2] > 0.95


def test_the_figures_are_of_drafted_and_fresh_trees() -> None:
    """Trees without nodes and stale ones would draw them down."""
    drafter, old, target = EnumerableDrafter(7), EnumerableDrafter(8), EnumerableTarget(7)
    bush = DrawnTree((-1, -1), (0, 1))
    trajectories = [
        tree_trajectory(
            tree, target, rule="sample_and_match", accepted=accepted, version=version, log_probs=log_probs_of(old, tree)
        )
        for tree, accepted, version in [(bush, [False, True], 5), (DrawnTree((), ()), [], 5), (bush, [True, False], 3)]
    ]
    out = AcceptanceRewardLoss(drafter, target.head, max_staleness=1)(pack(trajectories))
    torch.testing.assert_close(out["expected_accepted"], target.p(())[:2].sum())
    assert float(out["accepted"]) == 1.0 and float(out["stale"]) == 0.5
    ratio = (drafter.log_q(()) - old.log_q(())).exp()[:2].mean().detach()
    torch.testing.assert_close(out["ratio"], ratio)
    trajectories[2]["nodes", "log_probs"] += 1.0
    torch.testing.assert_close(AcceptanceRewardLoss(drafter, target.head, max_staleness=1)(pack(trajectories)), out)


def test_a_fresh_round_starts_the_count_of_stale_batches_anew() -> None:
    drafter, target = EnumerableDrafter(7), EnumerableTarget(7)
    old, new = (
        pack([tree_trajectory(DrawnTree((-1,), (0,)), target, rule="sample_and_match", version=v)]) for v in (3, 5)
    )
    loss = AcceptanceRewardLoss(drafter, target.head, max_staleness=1)
    for batch in [new, *[old] * 20, new, *[old] * 20]:
        loss(batch)
    with pytest.raises(ValueError, match="21 batches in a row"):
        loss(old)


def test_a_token_without_a_row_was_not_drawn_from_the_drafter() -> None:
    drafter, target = EnumerableDrafter(9, draft_vocab=torch.tensor([0, 2])), EnumerableTarget(9)
    batch = pack([tree_trajectory(DrawnTree((-1,), (1,)), target, rule="sample_and_match")])
    with pytest.raises(ValueError, match=r"not drawn from the drafter .* its token has no row.* \(drafter.path\)"):
        AcceptanceRewardLoss(drafter, target.head)(batch)


def test_baselines_are_refused_for_shapes_that_will_never_hold_siblings() -> None:
    """A width of two with the nodes of one chain is a chain."""
    settings = {"baseline": "leave_one_out"}
    AcceptanceRewardLoss.check_served(settings, TreeShape(3, 2, 6, mode="sampled"))
    with pytest.raises(ValueError, match="drafter.width=2 and drafter.num_nodes=3 hold one chain"):
        AcceptanceRewardLoss.check_served(settings, TreeShape(3, 2, 3, mode="sampled"))
    with pytest.raises(ValueError, match="needs independent siblings; set drafter.mode=sampled"):
        AcceptanceRewardLoss.check_served(settings, TreeShape(3, 2, 6, mode="sampled_without_replacement"))


def test_trees_of_several_rules_in_one_batch() -> None:
    drafter, target = EnumerableDrafter(8), EnumerableTarget(8)
    matched, rejected = (
        tree_trajectory(DrawnTree(CHAIN2, (1, 2)), target, rule=rule) for rule in ("sample_and_match", "rejection")
    )
    loss = AcceptanceRewardLoss(drafter, target.head, reduction="sum")
    together = table_gradient(drafter, loss(pack([matched, rejected]))["loss_acceptance_reward"])
    apart = sum(table_gradient(drafter, loss(pack([t]))["loss_acceptance_reward"]) for t in (matched, rejected))
    torch.testing.assert_close(together, apart)


def test_a_reduced_draft_vocabulary_keeps_the_targets_mass() -> None:
    """The drafter has two of three tokens; the third keeps its share of p."""
    drafter, target = EnumerableDrafter(9, draft_vocab=torch.tensor([0, 2])), EnumerableTarget(9)
    loss = AcceptanceRewardLoss(drafter, target.head, reduction="none")
    p, items = target.p(()), []
    q = drafter.log_q(()).exp()
    for row, token in enumerate((0, 2)):
        drawn = DrawnTree((-1,), (token,))
        items.append(
            (tree_trajectory(drawn, target, rule="rejection", log_probs=[float(q[row].detach().log())]), q[row])
        )
    truth = table_gradient(drafter, torch.minimum(p[[0, 2]], q).sum())
    torch.testing.assert_close(-table_gradient(drafter, expectation(items, loss)), truth, atol=1e-10, rtol=0)


def test_greedy_accepts_nothing_where_the_choice_has_no_row() -> None:
    """p over the draft vocabulary is a row of zeros then, whose argmax means nothing."""
    target = EnumerableTarget(4, 0.0)
    draft_vocab = torch.tensor([t for t in range(VOCAB) if t != int(target.p(()).argmax())])
    drafter = EnumerableDrafter(4, draft_vocab=draft_vocab)
    batch = pack([tree_trajectory(DrawnTree((-1,), (int(draft_vocab[0]),)), target, rule="greedy")])
    assert float(AcceptanceRewardLoss(drafter, target.head)(batch)["expected_accepted"]) == 0.0


REFUSED = {
    "topk": (dict(mode="topk"), {}, r"'draft_mode'\) is 'topk', .* no exploration; serve with drafter.mode=sampled"),
    "lookup": (dict(log_probs=[-torch.inf] * 4), {}, r"not drawn from the drafter .* drafter.mode=sampled"),
    "no probabilities": (dict(log_probs=[torch.nan] * 4), {}, r"\('nodes', 'log_probs'\) is not finite"),
    "bits on trees": (dict(rule="rejection"), dict(reward="recorded"), r"reward='recorded' does not hold .* trees"),
    "group under rejection": (dict(rule="rejection"), dict(baseline="group"), "baseline='group' .* use leave_one_out"),
    "dependent siblings": (
        dict(mode="sampled_without_replacement"), dict(baseline="leave_one_out"), "needs independent siblings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_cannot_learn_from_is_refused_by_name(why: str) -> None:
    served, settings, message = REFUSED[why]
    target = EnumerableTarget(0)
    batch = pack([tree_trajectory(DrawnTree(BRANCHES, (0, 1, 2, 0)), target, **{"rule": "sample_and_match", **served})])
    with pytest.raises(ValueError, match=f"'acceptance_reward'.*{message}"):
        AcceptanceRewardLoss(EnumerableDrafter(0), target.head, **settings)(batch)


def test_a_baseline_needs_siblings() -> None:
    target = EnumerableTarget(0)
    batch = pack([tree_trajectory(DrawnTree(CHAIN2, (0, 1)), target, rule="sample_and_match")])
    with pytest.raises(ValueError, match="baseline='leave_one_out' compares siblings, .* drafter.width > 1"):
        AcceptanceRewardLoss(EnumerableDrafter(0), target.head, baseline="leave_one_out")(batch)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(reward="bits"), "reward must be 'expected' or 'recorded', got 'bits'"),
        (dict(baseline="mean"), "baseline must be 'none', 'leave_one_out' or 'group', got 'mean'"),
        (dict(clip=0.0), "clip must be positive or null, got 0.0"),
        (dict(max_staleness=-1), "max_staleness must not be negative, got -1"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AcceptanceRewardLoss(EnumerableDrafter(0), EnumerableTarget(0).head, **settings)


def test_rounds_without_nodes_do_not_count() -> None:
    drafter, target = EnumerableDrafter(0), EnumerableTarget(0)
    full, empty = (
        tree_trajectory(DrawnTree(p, t), target, rule="sample_and_match") for p, t in (((-1,), (1,)), ((), ()))
    )
    loss = AcceptanceRewardLoss(drafter, target.head)
    torch.testing.assert_close(
        loss(pack([full, empty]))["loss_acceptance_reward"], loss(pack([full]))["loss_acceptance_reward"]
    )
    for settings in ({}, {"baseline": "group"}, {"baseline": "leave_one_out", "reward": "recorded"}):
        nothing = AcceptanceRewardLoss(drafter, target.head, **settings)(pack([empty]))
        assert float(nothing["loss_acceptance_reward"].detach()) == 0.0


def test_texts_are_all_there() -> None:
    assert len(TEXTS) == 1 + 3 + 9 + 27

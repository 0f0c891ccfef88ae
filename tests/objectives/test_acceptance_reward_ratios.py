"""AcceptanceRewardLoss on trees of older weights: importance ratios, their clip, and group scores."""

from __future__ import annotations

import pytest
import torch
from reward_estimates import BRANCHES, BUSH, CHAIN2, CHAIN3, SERVED, estimated, exact, one_tree

from aurora_rl.objectives import AcceptanceRewardLoss
from aurora_rl.objectives.acceptance_reward import _standardised
from aurora_rl.objectives.tree_law import before
from aurora_rl.testing.enumerable_worlds import (
    TEXTS,
    VOCAB,
    DrawnTree,
    EnumerableDrafter,
    EnumerableTarget,
    log_probs_of,
    table_gradient,
    tree_trajectory,
)
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex


def test_group_scores_are_standardised_within_a_root() -> None:
    drafter, target = EnumerableDrafter(5), EnumerableTarget(5)
    tree = DrawnTree(BRANCHES, (0, 1, 2, 0))
    batch = pack([tree_trajectory(tree, target, rule="sample_and_match", log_probs=log_probs_of(drafter, tree))])
    loss = AcceptanceRewardLoss(drafter, target.head, baseline="group", reduction="sum")
    p = target.p(())
    branch = [p[0] * (1 + target.p((0,))[2]), p[1] * (1 + target.p((1,))[0])]
    sign = 1.0 if branch[0] > branch[1] else -1.0  # of two, the better is at plus one deviation
    scores = [drafter.log_q(()), drafter.log_q(()), drafter.log_q((0,)), drafter.log_q((1,))]
    picked = [s[t] for s, t in zip(scores, tree.tokens, strict=True)]
    expected = -(sign * (picked[0] + picked[2]) - sign * (picked[1] + picked[3]))
    got = table_gradient(drafter, loss(batch)["loss_acceptance_reward"])
    torch.testing.assert_close(got, table_gradient(drafter, expected), atol=1e-4, rtol=1e-4)


def test_a_clipped_ratio_stops_what_has_moved_far_enough() -> None:
    drafter, target = EnumerableDrafter(6), EnumerableTarget(6)
    tree = DrawnTree((-1,), (1,))
    now = float(drafter.log_q(())[1].detach())
    for behaviour, moves in ((now, True), (now - 0.5, False), (now + 0.5, True)):
        batch = pack([tree_trajectory(tree, target, rule="sample_and_match", log_probs=[behaviour])])
        out = AcceptanceRewardLoss(drafter, target.head, clip=0.2)(batch)
        assert bool(table_gradient(drafter, out["loss_acceptance_reward"]).any()) is moves
        assert float(out["ratio"]) == pytest.approx(torch.tensor(now - behaviour).exp().item(), rel=1e-5)
        # Not clipped, the gradient is the ratio's.
    free = AcceptanceRewardLoss(drafter, target.head, clip=10.0)(batch)["loss_acceptance_reward"]
    ratio = (drafter.log_q(())[1] - (now + 0.5)).exp()
    torch.testing.assert_close(
        table_gradient(drafter, free), table_gradient(drafter, -ratio * target.p(())[1]), atol=1e-6, rtol=1e-6
    )


def test_a_ratio_without_replacement_is_of_what_earlier_siblings_left() -> None:
    drafter, old, target = EnumerableDrafter(6), EnumerableDrafter(7), EnumerableTarget(6)
    tree, mode = DrawnTree((-1, -1), (0, 2)), "sampled_without_replacement"
    batch = one_tree(drafter, target, tree, "sample_and_match", drew=old, mode=mode)
    now, then = ([q[0], q[2] / (q[1] + q[2])] for q in (drafter.log_q(()).exp(), old.log_q(()).exp()))
    ratio = [a / b for a, b in zip(now, then, strict=True)]
    clipped = [not 0.8 < float(r.detach()) < 1.2 for r in ratio]
    p = target.p(())
    # What hangs on the first is what both have accepted; a gain that is clipped has no gradient.
    credit = [p[0] + p[2], p[2]]
    gains = [torch.minimum(r * c, r.clamp(0.8, 1.2) * c) for r, c in zip(ratio, credit, strict=True)]
    out = AcceptanceRewardLoss(drafter, target.head, clip=0.2)(batch)
    got, expected = (table_gradient(drafter, x) for x in (out["loss_acceptance_reward"], -sum(gains)))
    assert any(clipped) and expected.any()
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(out["ratio"], sum(ratio).detach() / 2)


def test_fresh_draws_of_a_sure_drafter_have_a_ratio_of_one_in_float32() -> None:
    """A recorded log-probability of almost 0 does not say what it left."""
    start = torch.zeros(len(TEXTS), VOCAB, dtype=torch.float64)
    start[:, 0], start[:, 1] = 18.0, 0.5
    drafter, target, mode = EnumerableDrafter(0, start=start), EnumerableTarget(0), "sampled_without_replacement"
    batch = one_tree(drafter, target, DrawnTree((-1, -1), (0, 2)), "sample_and_match", mode=mode)
    # As a drafter in float32 computes it.
    batch["nodes", "log_probs"] = torch.tensor([18.0, 0.5, 0.0]).log_softmax(-1)[[0, 2]]
    assert float(batch["nodes", "log_probs"][0].exp()) == 1.0
    out = AcceptanceRewardLoss(drafter, target.head)(batch)
    assert float(out["ratio"]) == pytest.approx(1.0, abs=1e-6)


def test_stale_rounds_are_left_out_and_counted() -> None:
    drafter, target = EnumerableDrafter(7), EnumerableTarget(7)
    old, new = (
        tree_trajectory(DrawnTree((-1,), (t,)), target, rule="sample_and_match", version=v) for t, v in ((0, 3), (1, 5))
    )
    loss = AcceptanceRewardLoss(drafter, target.head, max_staleness=1)
    both = loss(pack([old, new]))
    assert float(both["stale"]) == 0.5
    alone = AcceptanceRewardLoss(drafter, target.head)(pack([new]))
    torch.testing.assert_close(both["loss_acceptance_reward"], alone["loss_acceptance_reward"])
    torch.testing.assert_close(both["expected_accepted"], target.p(())[1])
    for _ in range(20):  # the newest version that was seen counts, not the batch's
        out = loss(pack([old]))
        assert float(out["loss_acceptance_reward"].detach()) == 0.0 and float(out["stale"]) == 1.0
    with pytest.raises(
        ValueError, match=r"21 batches in a row is older than max_staleness=1 versions \(newest 5, this"
    ):
        loss(pack([old]))


@pytest.mark.parametrize("parents", [(-1,), CHAIN3, BRANCHES, BUSH], ids=str)
@pytest.mark.parametrize(("rule", "mode", "temperature"), SERVED)
def test_trees_of_older_weights_teach_as_much(
    parents: tuple[int, ...], rule: str, mode: str, temperature: float
) -> None:
    """Replay brings them: their ratios make the gradient that of the current weights."""
    old, drafter, target = EnumerableDrafter(11), EnumerableDrafter(12), EnumerableTarget(11, temperature)
    expected = exact(drafter, target, parents, rule, mode)
    for settings in ({}, {"baseline": "leave_one_out"} if mode == "sampled" and parents in (BRANCHES, BUSH) else {}):
        got = estimated(drafter, target, parents, rule, mode, drew=old, **settings)
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("parents", [CHAIN3, BRANCHES], ids=str)
def test_accept_bits_of_older_weights_teach_as_much(parents: tuple[int, ...]) -> None:
    old, drafter, target = EnumerableDrafter(11), EnumerableDrafter(12), EnumerableTarget(11)
    got = estimated(drafter, target, parents, "sample_and_match", "sampled", bits=True, drew=old, reward="recorded")
    torch.testing.assert_close(got, exact(drafter, target, parents, "sample_and_match", "sampled"), atol=1e-10, rtol=0)


@pytest.mark.parametrize(
    ("rule", "mode"), [("sample_and_match", "sampled"), ("rejection", "sampled"), SERVED[6][:2]], ids=str
)
def test_a_wide_clip_is_right_of_one_token_and_near_on_chains(rule: str, mode: str) -> None:
    """PPO's ratio is a draw's own: of longer chains it is an approximation, for weights near those that drew."""
    target = EnumerableTarget(11)
    old = EnumerableDrafter(0, start=0.5 * target.table.log_softmax(-1))
    moved = torch.randn(old.table.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drafter = EnumerableDrafter(0, start=old.table.detach() + 0.3 * moved)
    for parents, least in (((-1,), 1 - 1e-9), (CHAIN2, 0.98), (CHAIN3, 0.98)):
        got = estimated(drafter, target, parents, rule, mode, drew=old, clip=1e6).flatten()
        expected = exact(drafter, target, parents, rule, mode).flatten()
        assert torch.cosine_similarity(got, expected, 0) > least


def test_a_clip_without_a_baseline_silences_what_has_grown() -> None:
    """And nothing else, so that it may lead back; a baseline tells the draws that should grow from the others."""
    drafter, target, old = EnumerableDrafter(6), EnumerableTarget(6), EnumerableDrafter(7)
    got = estimated(drafter, target, (-1,), "sample_and_match", "sampled", drew=old, clip=0.1)[0]
    q, before_ = drafter.log_q(()).exp(), old.log_q(()).exp()
    grown = q / before_ > 1.1
    assert grown.any() and not grown.all()
    score = torch.eye(VOCAB, dtype=torch.float64) - q
    kept = torch.where(grown, 0.0, q * target.p(()))
    torch.testing.assert_close(got, (kept[:, None] * score).sum(0).detach(), atol=1e-10, rtol=0)


def test_the_ratio_of_grad_r_is_clipped_too() -> None:
    drafter, target = EnumerableDrafter(12), EnumerableTarget(11)
    q, p = drafter.log_q(()).exp(), target.p(())
    token = int((q > p).nonzero()[0])  # accepted with p / q: grad R counts
    recorded = float(drafter.log_q(())[token].detach()) - 3.0  # a ratio of e^3
    batch = pack([tree_trajectory(DrawnTree((-1,), (token,)), target, rule="rejection", log_probs=[recorded])])
    got = table_gradient(drafter, AcceptanceRewardLoss(drafter, target.head, clip=0.2)(batch)["loss_acceptance_reward"])
    # The score's gain is clipped to a constant, so that grad R at the bound of the ratio is all there is.
    expected = table_gradient(drafter, -1.2 * p[token] / q[token])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)


def test_bits_of_older_weights_are_refused_under_rejection() -> None:
    target = EnumerableTarget(0)
    batch = pack([tree_trajectory(DrawnTree(CHAIN2, (0, 1)), target, rule="rejection")])
    with pytest.raises(ValueError, match="reward='recorded' with clip=0.2 does not hold for rejection"):
        AcceptanceRewardLoss(EnumerableDrafter(0), target.head, reward="recorded", clip=0.2)(batch)


def test_siblings_are_summed_as_well_in_float32() -> None:
    """A large batch must not cost the digits of a single context."""
    first = 1 - torch.logspace(-5, -1, 20_000, dtype=torch.float64)
    values, context = torch.stack([first, 1 - first], 1).flatten(), torch.arange(20_000).repeat_interleave(2)
    exact_sums = before(context, values)
    torch.testing.assert_close(before(context, values.float()).double(), exact_sums, atol=1e-7, rtol=0)


def test_branches_that_are_nearly_alike_are_standardised_in_float32() -> None:
    target = EnumerableTarget(5)
    batch = pack([tree_trajectory(DrawnTree(BUSH, (0, 1, 2)), target, rule="sample_and_match")])
    trees, below = TreeIndex.of(batch), torch.tensor([3.0, 3.0001, 3.0002])
    expected = torch.tensor([-1.2247, 0.0, 1.2247])
    torch.testing.assert_close(_standardised(trees, below), expected, atol=0.05, rtol=0)

"""AcceptanceRewardLoss: its gradient, summed over all trees and outcomes, is that of the expected accepted length.

Drafter and target are tables over three tokens, the rules are followed by their definitions, and every tree that can be
drawn is. So a biased estimator shows to the last digit, and the well-known wrong ones have to.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import ProbabilisticTensorDictModule, ProbabilisticTensorDictSequential, TensorDictModule
from torch import Tensor
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.llm import GRPOLoss

from aurora_rl.objectives import AcceptanceRewardLoss
from aurora_rl.objectives.acceptance_reward import _standardised, clipped_gain
from aurora_rl.objectives.tree_law import before
from aurora_rl.policies import TreeShape
from aurora_rl.testing.enumerable_worlds import (
    TEXTS,
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
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

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

    def cosine(count: int, **settings: str) -> float:
        found = []
        for _ in range(20):
            drawn = law.multinomial(count, True, generator=generator).bincount(minlength=len(every)).double()
            items = [
                (tree_trajectory(t, target, rule="sample_and_match", log_probs=log_probs_of(drafter, t)), n / count)
                for t, n in zip(every, drawn, strict=True) if n
            ]  # fmt: skip
            loss = AcceptanceRewardLoss(drafter, target.head, reduction="none", **settings)
            found.append(
                torch.cosine_similarity(
                    -table_gradient(drafter, expectation(items, loss)).flatten(), truth.flatten(), 0
                )
            )
        return float(torch.stack(found).mean())

    for settings in ({}, {"baseline": "leave_one_out"}):
        found = [cosine(n, **settings) for n in (10, 100, 1000)]
        assert found[0] < found[1] < found[2] and found[2] > 0.95


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


def test_the_clipped_gain_is_that_of_torchrls_clip_ppo() -> None:
    torch.manual_seed(0)
    count, clip = 200, 0.2
    logits = torch.nn.Linear(4, VOCAB).double()
    actor = ProbabilisticTensorDictSequential(
        TensorDictModule(logits, in_keys=["observation"], out_keys=["logits"]),
        ProbabilisticTensorDictModule(
            in_keys=["logits"], out_keys=["action"], distribution_class=torch.distributions.Categorical
        ),
    )
    td = TensorDict(
        {
            "observation": torch.randn(count, 4).double(), "action": torch.randint(VOCAB, (count,)),
            "action_log_prob": -torch.rand(count).double() - 0.5, "advantage": torch.randn(count, 1).double(),
        },
        [count],
    )  # fmt: skip
    reference = ClipPPOLoss(actor, None, clip_epsilon=clip, entropy_bonus=False, critic_coeff=None)
    log_q = logits(td["observation"]).log_softmax(-1).gather(1, td["action"][:, None])[:, 0]
    loss = -clipped_gain(log_q, td["action_log_prob"], td["advantage"][:, 0], clip).mean()
    expected = reference(td)["loss_objective"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    mine = logits.weight.grad.clone()
    logits.weight.grad = None
    expected.backward()
    named = dict(reference.named_parameters())
    gradient = (
        logits.weight.grad if logits.weight.grad is not None else next(p.grad for p in named.values() if p.ndim == 2)
    )
    torch.testing.assert_close(mine, gradient)


class Chains(torch.nn.Module):
    """The drafter as TorchRL's GRPOLoss sees a policy: sequences of tokens, each with its prefix."""

    def __init__(self, drafter: EnumerableDrafter) -> None:
        super().__init__()
        self.drafter = drafter

    def get_dist(self, td: TensorDict, logits_key: str) -> SimpleNamespace:
        def log_prob(action: Tensor) -> Tensor:
            return torch.stack(
                [
                    torch.stack([self.drafter.log_q(tuple(row[:i]))[token] for i, token in enumerate(row)])
                    for row in action.tolist()
                ]
            )

        return SimpleNamespace(log_prob=log_prob, mask=torch.ones(td.shape + (2,), dtype=torch.bool))


def test_the_group_baseline_with_a_clip_is_torchrls_grpo() -> None:
    """Branches of a root are a group, their values the rewards: the same loss and gradient."""
    drafter, target = EnumerableDrafter(10), EnumerableTarget(10)
    drawn = [DrawnTree(BRANCHES, tokens) for tokens in ((0, 1, 2, 0), (2, 0, 1, 1), (1, 2, 0, 0))]
    behaviour = [[-0.9, -1.3, -0.6, -1.0], [-1.1, -0.7, -1.6, -0.8], [-1.0, -0.4, -1.2, -2.0]]
    batch = pack(
        [
            tree_trajectory(tree, target, rule="sample_and_match", log_probs=log_probs)
            for tree, log_probs in zip(drawn, behaviour, strict=True)
        ]
    )
    out = AcceptanceRewardLoss(drafter, target.head, baseline="group", clip=0.2, reduction="sum")(batch)
    tokens, log_probs, advantage = [], [], []
    for tree, recorded in zip(drawn, behaviour, strict=True):
        first, then = tree.tokens[:2], tree.tokens[2:]
        reward = torch.stack([target.p(())[a] * (1 + target.p((a,))[b]) for a, b in zip(first, then, strict=True)])
        score = (reward - reward.mean()) / (reward.std(correction=0) + 1e-6)
        for branch in range(2):
            tokens.append([first[branch], then[branch]])
            log_probs.append([recorded[branch], recorded[2 + branch]])
            advantage.append([float(score[branch])] * 2)
    td = TensorDict(
        {
            "tokens": {"full": torch.tensor(tokens)}, "log_probs": {"full": torch.tensor(log_probs).double()},
            "advantage": torch.tensor(advantage).double()[:, :, None],
        },
        [6],
    )  # fmt: skip
    grpo = GRPOLoss(Chains(drafter), clip_epsilon=0.2, entropy_bonus=False, aggregation="none")
    reference = grpo(td).loss_objective.sum()
    torch.testing.assert_close(out["loss_acceptance_reward"], reference, atol=1e-5, rtol=1e-5)
    got, expected = (table_gradient(drafter, loss) for loss in (out["loss_acceptance_reward"], reference))
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_texts_are_all_there() -> None:
    assert len(TEXTS) == 1 + 3 + 9 + 27

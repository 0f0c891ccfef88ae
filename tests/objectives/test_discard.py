"""DiscardSamplingLoss: which contexts count, with which weights, against hand-made sums over tables."""

from __future__ import annotations

import pytest
import torch
from tiny_recordings import trajectory_of

from aurora_rl.objectives import DiscardSamplingLoss, ExpectedLengthLoss
from aurora_rl.policies import Eagle3Drafter, MedusaDrafter, TargetParts, TreeShape
from aurora_rl.testing import tiny_target
from aurora_rl.testing.enumerable_worlds import VOCAB, DrawnTree, EnumerableDrafter, EnumerableTarget, tree_trajectory
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

#   root: 0 accepted, 1 rejected; below 0: 2 rejected; below 1: 0 rejected
TREE, ACCEPTED = DrawnTree((-1, -1, 0, 1), (0, 1, 2, 0)), [True, False, False, False]
REJECTED = [(1,), (0, 2), (1, 0)]


def loss_of(
    drafter: EnumerableDrafter, judge: EnumerableTarget, log_probs: list[float] | None = None, **settings
) -> torch.Tensor:
    batch = pack([tree_trajectory(TREE, judge, rule="sample_and_match", accepted=ACCEPTED, log_probs=log_probs)])
    return DiscardSamplingLoss(drafter, judge.head, reduction="sum", **settings)(batch)["loss_discard"]


def kl(drafter: EnumerableDrafter, target: EnumerableTarget, text: tuple[int, ...]) -> torch.Tensor:
    p = target.p(text)
    return (p * (p.log() - drafter.log_q(text))).sum()


def test_the_contexts_are_the_rejected_nodes() -> None:
    drafter, target = EnumerableDrafter(0), EnumerableTarget(0)
    torch.testing.assert_close(loss_of(drafter, target), sum(kl(drafter, target, text) for text in REJECTED))


def test_weights() -> None:
    drafter, target = EnumerableDrafter(1), EnumerableTarget(1)
    values = [kl(drafter, target, text) for text in REJECTED]
    decayed = [0.5 ** len(text) for text in REJECTED]
    expected = sum(w * v for w, v in zip(decayed, values, strict=True))
    torch.testing.assert_close(loss_of(drafter, target, weighting="decay", decay=0.5), expected)
    p = target.p
    reach = [p(())[1], p(())[0] * p((0,))[2], p(())[1] * p((1,))[0]]
    expected = sum(w * v for w, v in zip(reach, values, strict=True))
    torch.testing.assert_close(loss_of(drafter, target, weighting="reach"), expected)
    torch.testing.assert_close(loss_of(drafter, target, weight=0.1), 0.1 * sum(values))


def test_weights_are_exact_where_the_head_is_in_bfloat16() -> None:
    drafter, target = EnumerableDrafter(1), EnumerableTarget(1)
    batch = pack([tree_trajectory(TREE, target, rule="sample_and_match", accepted=ACCEPTED)])
    loss = DiscardSamplingLoss(drafter, target.head.bfloat16(), weighting="decay", decay=0.3)
    assert loss._weights(batch, TreeIndex.of(batch)).dtype == torch.float32


def test_the_targets_likeliest_tokens_alone() -> None:
    drafter, target = EnumerableDrafter(2), EnumerableTarget(2)
    expected = torch.zeros((), dtype=torch.float64)
    for text in REJECTED:
        best = target.p(text).topk(2)
        p = best.values / best.values.sum()
        expected = expected + (p * (p.log() - drafter.log_q(text)[best.indices])).sum()
    torch.testing.assert_close(loss_of(drafter, target, top_k=2), expected)
    torch.testing.assert_close(loss_of(drafter, target, top_k=VOCAB), loss_of(drafter, target))


@pytest.mark.parametrize("top_k", [5, 40])
def test_more_likeliest_tokens_and_how_often_the_first_agree(top_k: int) -> None:
    parts = TargetParts.of(tiny_target())
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(20)).double()
    batch = pack([trajectory_of(drafter, shape=TreeShape(3, 2), max_new_tokens=6)])
    rejected = ~batch["nodes", "accepted"]
    visited = torch.cat([torch.zeros(len(batch["rounds", "anchor"]), dtype=torch.bool), rejected])
    log_q = drafter.context_logits(batch, TreeIndex.of(batch), visited).log_softmax(-1)
    logits = (batch["nodes", "hidden"][rejected] @ parts.head.weight.T)[:, :20]
    expected = torch.zeros((), dtype=torch.float64)
    for row, scores in zip(log_q, logits, strict=True):
        best = scores.topk(min(top_k, 20))
        p = best.values.softmax(-1)
        expected = expected + (p * (p.log() - row[best.indices])).sum()
    out = DiscardSamplingLoss(drafter, parts.head, top_k=top_k, reduction="sum")(batch)
    torch.testing.assert_close(out["loss_discard"], expected)
    agree = (log_q.argmax(-1) == logits.argmax(-1)).double().mean()
    assert 0 < agree < 0.5  # so that it is not its contrary's figure
    torch.testing.assert_close(out["discard_agreement"].double(), agree)


def test_likeliest_tokens_keep_their_mass_where_nothing_is_renormalised() -> None:
    drafter, target = EnumerableDrafter(2), EnumerableTarget(2)
    expected = torch.zeros((), dtype=torch.float64)
    for text in REJECTED:
        p, best = target.p(text).max(), int(target.p(text).argmax())
        expected = expected + p * (p.log() - drafter.log_q(text)[best])
    torch.testing.assert_close(loss_of(drafter, target, top_k=1, renormalize=False), expected)
    assert loss_of(drafter, target, top_k=1, renormalize=True) != expected


def test_the_served_law_may_be_learned() -> None:
    drafter, cold = EnumerableDrafter(2), EnumerableTarget(2, 0.5)
    torch.testing.assert_close(
        loss_of(drafter, cold, target="served"), sum(kl(drafter, cold, text) for text in REJECTED)
    )
    greedy = EnumerableTarget(2, 0.0)
    expected = sum(-drafter.log_q(text)[int(greedy.p(text).argmax())] for text in REJECTED)
    torch.testing.assert_close(loss_of(drafter, greedy, target="served"), expected)


def test_contexts_whose_served_token_has_no_row_do_not_count() -> None:
    greedy = EnumerableTarget(2, 0.0)
    missing = int(greedy.p(REJECTED[0]).argmax())
    vocab = torch.tensor([t for t in range(VOCAB) if t != missing])
    drafter, rest = (
        EnumerableDrafter(2, draft_vocab=vocab),
        [t for t in REJECTED if int(greedy.p(t).argmax()) != missing],
    )
    assert 0 < len(rest) < len(REJECTED)
    row = {int(token): place for place, token in enumerate(vocab)}
    expected = sum(-drafter.log_q(text)[row[int(greedy.p(text).argmax())]] for text in rest)
    for renormalize in (True, False):
        got = loss_of(drafter, greedy, target="served", renormalize=renormalize, divergence="cross_entropy")
        torch.testing.assert_close(got, expected)


def test_nodes_of_others_do_not_count() -> None:
    drafter, target = EnumerableDrafter(3), EnumerableTarget(3)
    inf = float("-inf")
    got = loss_of(drafter, target, log_probs=[-1.0, inf, -1.0, inf])  # prompt lookup's
    torch.testing.assert_close(got, kl(drafter, target, (0, 2)))
    assert float(loss_of(drafter, target, log_probs=[-1.0, inf, inf, inf]).detach()) == 0.0


def test_a_drafter_predicts_at_its_own_depths_only() -> None:
    """Medusa with two heads has no prediction after its second token."""
    parts = TargetParts.of(tiny_target())
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(16), num_heads=2).double()
    recorded = trajectory_of(drafter, shape=TreeShape(2, 2), max_new_tokens=8)
    batch = pack([recorded])
    batch["nodes", "accepted"] = torch.zeros_like(batch["nodes", "accepted"])
    out = DiscardSamplingLoss(drafter, parts.head)(batch)
    parents = batch["nodes", "parents"]
    assert int(out["discarded"]) == int((parents < 0).sum()) < len(parents)


def test_before_the_first_pair_a_drafter_predicts_nothing() -> None:
    """A drafter reads a token with the one before it; another engine may draft from the first token all the same."""
    drafter, target = EnumerableDrafter(0), EnumerableTarget(0)
    trajectory = tree_trajectory(TREE, target, rule="sample_and_match", accepted=ACCEPTED)
    trajectory["rounds", "anchor"] -= 1
    trajectory["sequence", "prompt_length"] -= 1
    trajectory["sequence", "hidden"] = trajectory["sequence", "hidden"].repeat(2, 1)
    batch = pack([trajectory])
    out = DiscardSamplingLoss(drafter, target.head)(batch)
    assert float(out["discarded"]) == 0.0 and float(out["loss_discard"].detach()) == 0.0
    assert float(ExpectedLengthLoss(drafter, target.head, contexts="trees")(batch)["expected_length"]) == 0.0


def test_it_scores_what_serving_drafted_from() -> None:
    """At a rejected node EAGLE-3's prediction is that of the recorded children."""
    parts = TargetParts.of(tiny_target())
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(20)).double()
    batch = pack([trajectory_of(drafter, shape=TreeShape(3, 2), max_new_tokens=6)])
    seen: list[torch.Tensor] = []

    def spy(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
        seen.append(log_q)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    DiscardSamplingLoss(drafter, parts.head, divergence=spy)(batch)
    rejected = (~batch["nodes", "accepted"]).nonzero().flatten().tolist()
    offset, checked = batch["rounds", "offset"].tolist(), 0
    for first, last in zip(offset, offset[1:], strict=False):
        for node in range(first, last):
            parent = int(batch["nodes", "parents"][node]) + first
            if int(batch["nodes", "parents"][node]) >= 0 and parent in rejected:
                log_q = seen[0][rejected.index(parent), int(batch["nodes", "tokens"][node])]
                torch.testing.assert_close(log_q.float(), batch["nodes", "log_probs"][node], atol=1e-5, rtol=0)
                checked += 1
    assert checked > 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(top_k=0), "top_k must be at least 1 or null, got 0"),
        (dict(decay=0.0), r"decay must lie in \(0, 1\], got 0.0"),
        (dict(target="serving"), "target must be 'model' or 'served', got 'serving'"),
        (dict(top_k=4, divergence="reverse_kl"), "top_k=4 leaves out tokens that the reverse KL charges"),
        (dict(weighting="depth"), "weighting must be 'uniform', 'reach' or 'decay', got 'depth'"),
        (dict(divergence="kl"), "no divergence is called 'kl'; there are"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiscardSamplingLoss(EnumerableDrafter(0), EnumerableTarget(0).head, **settings)

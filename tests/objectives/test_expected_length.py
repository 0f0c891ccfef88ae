"""ExpectedLengthLoss: chains by loops over windows, trees by leaves of tables, and what it relaxes."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tiny_recordings import trajectory_of
from torch import Tensor

from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import ExpectedLengthLoss
from aurora_rl.policies import Eagle3Drafter, EagleDrafter, MedusaDrafter, TargetParts, TreeShape
from aurora_rl.testing import serve, tiny_target
from aurora_rl.testing.enumerable_worlds import (
    VOCAB,
    DrawnTree,
    EnumerableDrafter,
    EnumerableTarget,
    chance_of,
    drawn_trees,
    reach_of,
    tree_trajectory,
)
from aurora_rl.trajectories import pack
from aurora_rl.tree_index import TreeIndex

RULES = {"sample_and_match": 1.0, "rejection": 1.0, "greedy": 0.0}


def alpha(drafter: EnumerableDrafter, target: EnumerableTarget, text: tuple[int, ...], rule: str) -> Tensor:
    p, q = target.p(text), drafter.log_q(text).exp()
    return torch.minimum(p, q).sum() if rule == "rejection" else (p * q).sum()


def length(drafter: EnumerableDrafter, target: EnumerableTarget, tree: DrawnTree, **settings) -> Tensor:
    batch = pack([tree_trajectory(tree, target, rule=settings.pop("served"))])
    return -ExpectedLengthLoss(drafter, target.head, contexts="trees", **settings)(batch)["loss_expected_length"]


@pytest.mark.parametrize("rule", RULES)
def test_one_token_is_exact(rule: str) -> None:
    """At depth one the relaxation is the expectation itself, under every rule."""
    drafter, target = EnumerableDrafter(0), EnumerableTarget(0, RULES[rule])
    got = length(drafter, target, DrawnTree((-1,), (1,)), served=rule)
    truth = sum(chance_of(drafter, t, False) * reach_of(drafter, target, t, rule)[0] for t in drawn_trees((-1,)))
    torch.testing.assert_close(got, truth)


@pytest.mark.parametrize("rule", RULES)
def test_a_tree_is_the_mean_of_its_paths_by_reach(rule: str) -> None:
    drafter, target = EnumerableDrafter(1), EnumerableTarget(1, RULES[rule])
    tree = DrawnTree((-1, -1, 0, 0, 1), (0, 2, 1, 2, 0))
    a = lambda text: alpha(drafter, target, text, rule)  # noqa: E731
    plain = EnumerableTarget(1)  # paths count by the target at temperature 1
    leaves = {(0, 1): 0.0, (0, 2): 0.0, (2, 0): 0.0}
    weight = {leaf: plain.p(())[leaf[0]] * plain.p(leaf[:1])[leaf[1]] for leaf in leaves}
    total = sum(weight.values())
    expected = sum(w / total * (a(()) + a(()) * a(leaf[:1])) for leaf, w in weight.items())
    torch.testing.assert_close(length(drafter, target, tree, served=rule), expected)


def test_the_rule_may_be_given() -> None:
    drafter, target = EnumerableDrafter(2), EnumerableTarget(2)
    tree = DrawnTree((-1, 0), (0, 1))
    with_rule = length(drafter, target, tree, served="sample_and_match", rule="rejection")
    torch.testing.assert_close(with_rule, length(drafter, target, tree, served="rejection"))
    greedy = length(drafter, target, tree, served="sample_and_match", rule="greedy")
    best = [drafter.log_q(t).exp()[int(target.p(t).argmax())] for t in ((), (0,))]
    torch.testing.assert_close(greedy, best[0] + best[0] * best[1])


@pytest.mark.parametrize(("rule", "temperature"), [(None, 0.7), ("rejection", 0.7), ("greedy", 0.7), (None, 0.0)])
def test_windows_of_text_by_loops(rule: str | None, temperature: float) -> None:
    torch.manual_seed(0)
    model = tiny_target()
    parts, vocab, steps = TargetParts.of(model), torch.arange(0, 32, 2), 3
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=vocab).double()
    prompts = [torch.randint(32, (n,)) for n in (4, 1)]
    batch = pack(
        serve(
            drafter, model, prompts, shape=TreeShape(2), max_new_tokens=6, sampling_params=SamplingParams(temperature)
        )
    )
    loss = ExpectedLengthLoss(drafter, parts.head, rule=rule, steps=steps, reduction="none")
    got = -loss(batch)["loss_expected_length"][0]
    unroll, logits = drafter.unroll(batch, steps), batch["sequence", "hidden"] @ parts.head.weight.T
    greedy = temperature == 0 or rule == "greedy"
    p = torch.nn.functional.one_hot(logits.argmax(-1), 32).double() if greedy else (logits / temperature).softmax(-1)
    text = [t for b in batch["sequence", "tokens"].split([10, 7]) for t in b[-6:].tolist()]
    expected, sure = torch.zeros(12, dtype=torch.float64), torch.zeros(12, dtype=torch.float64)
    for start in range(12):
        end = 6 if start < 6 else 12
        reached = certain = torch.tensor(float(unroll.valid[0, start]), dtype=torch.float64)
        for j in range(min(steps, end - start)):
            at = start + j
            q = unroll.logits[j][at].softmax(-1)
            a = torch.minimum(p[at, vocab], q).sum() if rule == "rejection" else (p[at, vocab] * q).sum()
            reached, certain = reached * a, certain * (int(vocab[q.argmax()]) == text[at])
            expected[start] += reached.detach()
            sure[start] += certain  # what a chain of likeliest tokens has accepted of this very text
    torch.testing.assert_close(got.detach(), expected)
    out = ExpectedLengthLoss(drafter, parts.head, rule=rule, steps=steps)(batch)
    valid = unroll.valid[0]
    torch.testing.assert_close(out["top1_length"], sure[valid].mean())
    torch.testing.assert_close(out["expected_length"], expected[valid].mean())


def test_following_it_raises_what_is_accepted() -> None:
    """Gradient steps on a chain's own contexts raise the exact expected length of sampled drafting."""
    drafter, target = EnumerableDrafter(3), EnumerableTarget(3)
    parents = (-1, 0)

    def exact() -> float:
        total = sum(
            chance_of(drafter, t, False) * sum(reach_of(drafter, target, t, "rejection")) for t in drawn_trees(parents)
        )
        return float(total.detach())

    before, optimizer = exact(), torch.optim.Adam([drafter.table], lr=0.1)
    batch = pack([tree_trajectory(t, target, rule="rejection") for t in drawn_trees(parents)])
    loss = ExpectedLengthLoss(drafter, target.head, contexts="trees")
    for _ in range(60):
        optimizer.zero_grad()
        loss(batch)["loss_expected_length"].backward()
        optimizer.step()
    assert exact() > before + 0.3 and exact() > 1.8  # of two at most


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(rule="typical"), "no verification rule is called 'typical'"),
        (dict(contexts="sequence"), "contexts must be 'text' or 'trees', got 'sequence'"),
        (dict(steps=0), "needs steps >= 1, got 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExpectedLengthLoss(EnumerableDrafter(0), EnumerableTarget(0).head, **settings)


def test_a_vocabulary_without_the_targets_choice_accepts_nothing_greedily() -> None:
    target = EnumerableTarget(4, 0.0)
    draft_vocab = torch.tensor([t for t in range(VOCAB) if t != int(target.p(()).argmax())])
    drafter = EnumerableDrafter(4, draft_vocab=draft_vocab)
    batch = pack([tree_trajectory(DrawnTree((-1,), (int(draft_vocab[0]),)), target, rule="greedy")])
    out = ExpectedLengthLoss(drafter, target.head, contexts="trees")(batch)
    assert float(out["expected_length"]) == 0.0


def test_next_to_trees_stands_what_was_accepted() -> None:
    drafter, target = EnumerableDrafter(5), EnumerableTarget(5)
    trajectories = [
        tree_trajectory(DrawnTree((-1, 0, -1), (0, 1, 2)), target, rule="sample_and_match", accepted=accepted)
        for accepted in ([True, True, False], [False, False, True], [False, False, False], [True, False, False])
    ]
    out = ExpectedLengthLoss(drafter, target.head, contexts="trees")(pack(trajectories))
    assert float(out["accepted_length"]) == 1.0


def test_what_the_drafter_cannot_predict_counts_for_nothing() -> None:
    """Medusa with two heads in a tree of four levels: below the second there is nothing of it to accept."""
    parts = TargetParts.of(tiny_target())
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(16), num_heads=2).double()
    deep = trajectory_of(EagleDrafter.from_target(parts, draft_vocab=torch.arange(16)), shape=TreeShape(4, 2))
    batch = pack([deep])
    loss = ExpectedLengthLoss(drafter, parts.head, contexts="trees", reduction="sum")
    whole = loss(batch)["loss_expected_length"]
    logits = drafter.context_logits

    def poisoned(of: TensorDict, trees: TreeIndex, wanted: Tensor) -> Tensor:
        found = logits(of, trees, wanted)
        return (
            found.masked_fill((trees.depth >= 2)[wanted][:, None], 7.0)
            + torch.randn_like(found) * ((trees.depth >= 2)[wanted][:, None])
        )

    drafter.context_logits = poisoned  # type: ignore[method-assign]
    assert bool((TreeIndex.of(batch).depth >= 2).any())
    torch.testing.assert_close(loss(batch)["loss_expected_length"], whole)

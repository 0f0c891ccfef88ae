"""The target's outputs in both forms: equal with every token among the likeliest, and what a tail costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.envs import SamplingParams
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import (
    DIVERGENCES,
    AcceptanceRewardLoss,
    DiscardSamplingLoss,
    ExpectedLengthLoss,
    ImitationLoss,
    Objective,
    SumLoss,
    make_objectives,
    target_logits,
    target_rows,
)
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import serve, tiny_target, topk_form
from aurora_rl.trajectories import pack

V = 32
Served = tuple[Drafter, Tensor, dict[str, list[TensorDict]]]


@pytest.fixture(scope="module")
def served() -> Served:
    """A drafter whose vocabulary is half of the target's, and what it served in several ways."""
    torch.manual_seed(0)
    target = tiny_target()
    parts = TargetParts.of(target)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, V, 2)).double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    prompts = [torch.randint(V, (n,)) for n in (3, 1, 6)]
    plain, warped = SamplingParams(temperature=1.0), SamplingParams(temperature=0.7, top_k=6, top_p=0.9)
    ways: dict[str, tuple[str, SamplingParams, str]] = {
        "greedy": ("topk", SamplingParams(), "greedy"),
        "plain": ("topk", plain, "sample_and_match"),
        "warped": ("topk", warped, "sample_and_match"),
        "drawn": ("sampled", warped, "sample_and_match"),
        "rejected": ("sampled", plain, "rejection"),
    }
    return (
        drafter,
        parts.head,
        {
            name: serve(
                drafter,
                target,
                prompts,
                shape=TreeShape(3, 2, mode=mode),
                max_new_tokens=8,
                sampling_params=how,
                rule=rule,
            )
            for name, (mode, how, rule) in ways.items()
        },
    )


def likeliest(trajectories: list[TensorDict], head: Tensor, k: int = V) -> TensorDict:
    return pack([topk_form(t, head, k) for t in trajectories])


def loss_and_gradient(loss: Objective, batch: TensorDict) -> tuple[Tensor, Tensor]:
    value = loss(batch)[f"loss_{loss.name}"]
    gradient = torch.autograd.grad(value, [p for p in loss.drafter.parameters() if p.requires_grad], allow_unused=True)
    return value.detach(), torch.cat([g.flatten() for g in gradient if g is not None])


# ---- the forms ------------------------------------------------------------------------------------------------------


def test_logits_of_rows_by_hand() -> None:
    rows = TensorDict(
        {
            "topk_ids": torch.tensor([[4, 1], [0, 3]]),
            "topk_log_probs": torch.tensor([[0.5, 0.2], [0.6, 0.4]]).log(),
            "tail_log_prob": torch.tensor([math.log(0.3), -math.inf]),
        },
        batch_size=[2],
    )
    head = TargetHead(torch.zeros(5, 2))
    p = target_logits(rows, head).exp()
    torch.testing.assert_close(p, torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.5], [0.6, 0.0, 0.0, 0.4, 0.0]]))
    # Some tokens only, in an order of their own.
    some = torch.tensor([3, 1, 2])
    assert torch.equal(target_logits(rows, head, some).exp(), p[:, some])
    # An empty tail leaves a distribution on tokens that are all in it: nothing is known, so they are equal.
    torch.testing.assert_close(target_logits(rows, head, torch.tensor([2, 4])).softmax(-1)[1], torch.tensor([0.5, 0.5]))
    assert torch.equal(target_logits(rows, TargetHead(torch.zeros(5, 2).bfloat16())).exp(), p)
    assert target_logits(rows, head.double()).dtype == torch.float64


def test_rows_come_from_either_form(served: Served) -> None:
    _, head, recorded = served
    states, ids = pack(recorded["plain"]), likeliest(recorded["plain"], head, 4)
    assert set(target_rows(states).keys()) == {"hidden"} and len(target_rows(states)) == 24
    assert set(target_rows(ids, ("nodes", "hidden")).keys()) == {"topk_ids", "topk_log_probs", "tail_log_prob"}
    assert target_rows(ids, ("nodes", "hidden"))[:3]["topk_ids"].shape == (3, 4)
    with pytest.raises(KeyError, match="neither .*'teacher', 'hidden'.* nor topk_ids, topk_log_probs, tail_log_prob"):
        target_rows(ids, ("teacher", "hidden"))


# ---- all tokens are the likeliest: nothing is lost ------------------------------------------------------------------

EVERY: list[tuple[str, type[Objective], dict[str, Any]]] = [
    *(
        ("plain", kind, {"divergence": name, "renormalize": renormalize})
        for kind in (ImitationLoss, DiscardSamplingLoss)
        for name in DIVERGENCES
        for renormalize in (True, False)
    ),
    ("warped", ImitationLoss, {"weighting": "expected_length"}),
    ("plain", DiscardSamplingLoss, {"weighting": "reach", "top_k": 5}),
    *(
        (how, ExpectedLengthLoss, {"contexts": contexts, "rule": rule})
        for how in ("greedy", "plain", "warped", "rejected")
        for contexts in ("text", "trees")
        for rule in (None, "greedy", "rejection")
    ),
    *((how, AcceptanceRewardLoss, {}) for how in ("drawn", "rejected")),
    ("drawn", AcceptanceRewardLoss, {"baseline": "leave_one_out", "clip": 0.2}),
    ("drawn", AcceptanceRewardLoss, {"baseline": "group", "reward": "recorded"}),
]


@pytest.mark.parametrize(("how", "kind", "settings"), EVERY, ids=lambda x: x.name if isinstance(x, type) else str(x))
def test_with_every_token_both_forms_are_the_same(
    served: Served, how: str, kind: type[Objective], settings: dict[str, Any]
) -> None:
    drafter, head, recorded = served
    loss = kind(drafter, head, **settings)
    expected, slope = loss_and_gradient(loss, pack(recorded[how]))
    got, found = loss_and_gradient(loss, likeliest(recorded[how], head))
    assert slope.abs().max() > 1e-6
    torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found, slope, atol=1e-10, rtol=0)


def test_metrics_are_too(served: Served) -> None:
    drafter, head, recorded = served
    for kind in (ImitationLoss, DiscardSamplingLoss, ExpectedLengthLoss):
        expected, got = (kind(drafter, head)(b) for b in (pack(recorded["plain"]), likeliest(recorded["plain"], head)))
        for name in kind(drafter, head).metrics:
            torch.testing.assert_close(got[name], expected[name], atol=1e-10, rtol=0)


# ---- a tail ---------------------------------------------------------------------------------------------------------


def test_the_error_is_within_the_tails_mass_and_shrinks(served: Served) -> None:
    """|p − p̂| sums to at most twice the tail's mass; a total variation is off by no more than that mass."""
    drafter, head, recorded = served
    loss = ImitationLoss(drafter, head, divergence="total_variation", renormalize=False, reduction="none", decay=1.0)
    exact, p = loss(pack(recorded["plain"])), target_logits(target_rows(pack(recorded["plain"])), head).softmax(-1)
    gaps = []
    for k in (1, 2, 4, 8, 16, 31):
        batch = likeliest(recorded["plain"], head, k)
        mass = batch["sequence", "tail_log_prob"].exp()
        apart = (target_logits(target_rows(batch), head).softmax(-1) - p).abs().sum(-1)
        assert bool((apart <= 2 * mass + 1e-12).all())
        off = (loss(batch)["loss_imitation"] - exact["loss_imitation"]).abs()
        assert bool((off <= mass + 1e-12).all())
        gaps.append((float(apart.mean()), float(off.mean().detach())))
    assert gaps[0][0] > 0.1 and gaps[0][1] > 1e-3
    assert all(b[0] < a[0] for a, b in zip(gaps, gaps[1:], strict=False))
    assert gaps[-1][0] < 1e-12  # the one other token has all of the tail
    assert gaps[-2][1] < 0.1 * gaps[0][1]


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss])
def test_gradients_turn_to_the_exact_one(served: Served, kind: type[Objective]) -> None:
    drafter, head, recorded = served
    loss = kind(drafter, head)
    _, exact = loss_and_gradient(loss, pack(recorded["plain"]))
    found = [loss_and_gradient(loss, likeliest(recorded["plain"], head, k))[1] for k in (1, 4, 16)]
    off = [float((each - exact).norm() / exact.norm()) for each in found]
    assert off[0] > 2 * off[1] > 4 * off[2] > 0


def test_what_was_served_is_exact_where_the_tail_was_not(served: Served) -> None:
    """Greedy text needs the likeliest token alone, and sampling at top-k no more than that many, at any temperature."""
    drafter, head, recorded = served
    for how, k, settings in (("greedy", 1, {}), ("plain", 1, {"rule": "greedy"}), ("warped", 6, {})):
        loss = ExpectedLengthLoss(drafter, head, **settings)
        expected, slope = loss_and_gradient(loss, pack(recorded[how]))
        got, found = loss_and_gradient(loss, likeliest(recorded[how], head, k))
        torch.testing.assert_close(got, expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(found, slope, atol=1e-10, rtol=0)
    loss = ExpectedLengthLoss(drafter, head)
    assert (loss(likeliest(recorded["warped"], head, 2))["loss_expected_length"] - expected).abs() > 1e-4


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_no_tail_and_no_likely_token_with_a_row(served: Served, divergence: str, renormalize: bool) -> None:
    """All of the known mass outside the draft vocabulary: losses and gradients stay finite."""
    drafter, head, recorded = served
    batch = likeliest(recorded["plain"], head, 2)
    for part in ("sequence", "nodes"):
        batch[part, "topk_ids"] = torch.tensor([1, 3]).repeat(len(batch[part, "topk_ids"]), 1)
        batch[part, "topk_log_probs"] = torch.full_like(batch[part, "topk_log_probs"], math.log(0.5))
        batch[part, "tail_log_prob"] = torch.full_like(batch[part, "tail_log_prob"], -math.inf)
    for kind in (ImitationLoss, DiscardSamplingLoss):
        value, gradient = loss_and_gradient(kind(drafter, head, divergence=divergence, renormalize=renormalize), batch)
        assert bool(torch.isfinite(value)) and bool(torch.isfinite(gradient).all())
    out = ExpectedLengthLoss(drafter, head, contexts="trees")(batch)
    assert float(out["expected_length"]) == pytest.approx(0.0, abs=1e-12)


# ---- what a batch may lack ------------------------------------------------------------------------------------------


def test_without_the_drafters_log_probabilities(served: Served) -> None:
    drafter, head, recorded = served
    settings: list[dict[str, Any]] = [
        {"name": "imitation"}, {"name": "discard", "weighting": "reach"}, {"name": "expected_length"},
        {"name": "expected_length", "contexts": "trees"},
    ]  # fmt: skip
    loss = SumLoss(make_objectives(settings, drafter, head))
    for batch in (pack(recorded["plain"]), likeliest(recorded["plain"], head, 4)):
        poorer = batch.exclude(("nodes", "log_probs"))
        assert ("nodes", "log_probs") not in poorer.keys(True)
        expected, got = loss(batch), loss(poorer)
        assert set(got.keys()) == set(loss.out_keys)
        for key in loss.out_keys:
            assert torch.equal(got[key], expected[key])


def test_a_policy_gradient_refuses_a_batch_without_them(served: Served) -> None:
    drafter, head, recorded = served
    bare = [t.exclude(("nodes", "log_probs")) for t in recorded["drawn"]]
    message = (
        r"objective 'acceptance_reward' needs \('nodes', 'log_probs'\) in the batch, which has no such entry; an "
        r"engine that keeps the drafter's log-probabilities supplies it.*drafter.mode=sampled"
    )
    with pytest.raises(ValueError, match=message):
        AcceptanceRewardLoss(drafter, head)(pack(bare))
    with pytest.raises(ValueError, match=message):  # one without is enough
        AcceptanceRewardLoss(drafter, head)(pack([*bare[:1], *recorded["drawn"][1:]]))


def test_the_targets_outputs_are_needed_in_one_form(served: Served) -> None:
    drafter, head, recorded = served
    for batch, missing in (
        (pack(recorded["plain"]), ("nodes", "hidden")),
        (likeliest(recorded["plain"], head, 4), ("nodes", "tail_log_prob")),
    ):
        with pytest.raises(
            ValueError, match=r"'discard' needs \('nodes', 'hidden'\) .*; .* or topk_ids, topk_log_probs"
        ):
            DiscardSamplingLoss(drafter, head)(batch.exclude(missing))


def test_regression_needs_hidden_states(served: Served) -> None:
    drafter, head, recorded = served
    with pytest.raises(
        ValueError, match="'imitation': regression needs the target's hidden states, .*; set regression=0"
    ):
        ImitationLoss(drafter, head, regression=0.1)(likeliest(recorded["plain"], head))


def test_keys_of_a_batch(served: Served) -> None:
    drafter, head, recorded = served
    loss = DiscardSamplingLoss(drafter, head)
    states, ids = pack(recorded["plain"]), likeliest(recorded["plain"], head, 4)
    assert loss.keys_of(states) == loss.in_keys
    there = loss.keys_of(ids)
    assert [key for key in there if key not in loss.in_keys] == [
        ("nodes", "topk_ids"), ("nodes", "topk_log_probs"), ("nodes", "tail_log_prob"),
    ]  # fmt: skip
    # Nothing else is read.
    assert torch.equal(loss(ids.select(*there))["loss_discard"], loss(ids)["loss_discard"])
    assert ("nodes", "log_probs") not in loss.keys_of(ids.exclude(("nodes", "log_probs")))


def test_the_topk_form_stands_next_to_the_key_of_hidden_states(served: Served) -> None:
    drafter, head, recorded = served
    loss, batch = ImitationLoss(drafter, head), likeliest(recorded["plain"], head, 4)
    expected = loss(batch)["loss_imitation"]
    for name in ("topk_ids", "topk_log_probs", "tail_log_prob"):
        batch["teacher", name] = batch["sequence"].pop(name)
    with pytest.raises(ValueError, match="needs .*'sequence', 'hidden'"):
        loss(batch)
    loss.set_keys(hidden=("teacher", "hidden"))
    assert torch.equal(loss(batch)["loss_imitation"], expected)

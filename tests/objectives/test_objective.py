"""The objective seam: conformance of all objectives, names, settings and sums."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tiny_drafters import eagle3_and_head
from tiny_recordings import trajectory_of
from torch import Tensor

from aurora_kernels import Target
from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import (
    DIVERGENCES,
    AcceptanceRewardLoss,
    DiscardSamplingLoss,
    ExpectedLengthLoss,
    ImitationLoss,
    Objective,
    Values,
    check_settings,
)
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape, Unroll
from aurora_rl.testing import check_objective, tiny_target
from aurora_rl.testing.enumerable_worlds import DrawnTree, EnumerableDrafter, EnumerableTarget, tree_trajectory
from aurora_rl.trajectories import pack

SETTINGS: list[tuple[type[Objective], dict[str, Any]]] = [
    (ImitationLoss, {}),
    (ImitationLoss, {"divergence": "reverse_kl", "renormalize": False, "weight": 0.3}),
    (ImitationLoss, {"regression": 0.5}),
    (ImitationLoss, {"weighting": "expected_length"}),
    (DiscardSamplingLoss, {}),
    (DiscardSamplingLoss, {"weighting": "reach", "divergence": "jensen_shannon"}),
    (DiscardSamplingLoss, {"weighting": "decay", "top_k": 5}),
    (ExpectedLengthLoss, {}),
    (ExpectedLengthLoss, {"rule": "rejection", "steps": 3}),
    (ExpectedLengthLoss, {"contexts": "trees"}),
    (ExpectedLengthLoss, {"contexts": "trees", "rule": "greedy"}),
    (AcceptanceRewardLoss, {}),
    (AcceptanceRewardLoss, {"baseline": "leave_one_out", "clip": 0.2}),
    (AcceptanceRewardLoss, {"baseline": "group", "reward": "recorded", "max_staleness": 4}),
]


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=lambda x: x.name if isinstance(x, type) else str(x))
def test_every_objective_keeps_its_promises(kind: type[Objective], settings: dict[str, Any]) -> None:
    check_objective(
        lambda drafter, head, reduction: kind(drafter, head, reduction=reduction, **settings),
        differentiable=settings.get("weighting") != "expected_length",
        unbiased=settings.get("baseline") != "group",
    )


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=lambda x: x.name if isinstance(x, type) else str(x))
def test_requests_that_nothing_was_drafted_for(kind: type[Objective], settings: dict[str, Any]) -> None:
    # As a server makes them while speculation does not pay.
    drafter, head = eagle3_and_head()
    loss = kind(drafter, head, **settings)
    shape = TreeShape(0, mode="sampled" if kind.sampled else "topk")
    batch = pack([trajectory_of(drafter, shape=shape, request=i) for i in range(2)])
    assert not len(batch["nodes", "tokens"])
    from_text = kind is ImitationLoss or (kind is ExpectedLengthLoss and settings.get("contexts") != "trees")
    for _ in range(19):
        loss(batch)
    value = loss(batch)[f"loss_{kind.name}"]
    value.backward()
    gradients = [p.grad for p in drafter.parameters() if p.grad is not None]
    assert bool(torch.isfinite(value)) and gradients and all(bool(torch.isfinite(g).all()) for g in gradients)
    # The text teaches all the same; trees, of which there are none, do not.
    assert any(bool(g.any()) for g in gradients) == from_text
    if not from_text:
        with pytest.raises(ValueError, match=f"'{kind.name}' learns from drafted nodes, and the first 21 batches have"):
            loss(batch)
        # Once there were some, plain decoding may last as long as it does not pay.
        drafted = pack([trajectory_of(drafter, shape=TreeShape(2, 2, mode=shape.mode))])
        fresh = kind(drafter, head, **settings)
        fresh(drafted)
        for _ in range(25):
            fresh(batch)


@pytest.mark.parametrize("divergence", list(DIVERGENCES))
def test_with_every_divergence(divergence: str) -> None:
    check_objective(
        lambda d, head, reduction: DiscardSamplingLoss(d, head, divergence=divergence, reduction=reduction),
        differentiable=divergence != "hybrid_overlap",  # its weight is held constant
    )


OVERLAPS = {"total_variation", "negative_log_overlap", "hybrid_overlap", "missed_probability"}


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss])
def test_overlaps_keep_the_mass_of_the_whole_vocabulary(kind: type[Objective]) -> None:
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter)])
    for name in DIVERGENCES:
        default, whole, part = (
            kind(drafter, head, divergence={"name": name}, **settings)(batch)[f"loss_{kind.name}"]
            for settings in ({}, {"renormalize": False}, {"renormalize": True})
        )
        assert whole != part or name == "cross_entropy"
        assert default == (whole if name in OVERLAPS else part)
        assert kind(drafter, head, divergence=name, renormalize=name in OVERLAPS).renormalize == (name in OVERLAPS)


def test_what_is_right_is_not_refused() -> None:
    for kind, settings in SETTINGS:
        assert check_settings({"name": kind.name, **settings}) is kind
    assert check_settings({"name": "imitation", "weight": 1}) is ImitationLoss  # YAML's 1 is a number too
    assert check_settings({"name": "acceptance_reward", "clip": None}) is AcceptanceRewardLoss


# ---- entries of a batch, and of the loss ----------------------------------------------------------------------------


def test_a_missing_entry_is_named() -> None:
    target = EnumerableTarget(0)
    batch = pack([tree_trajectory(DrawnTree((-1,), (0,)), target, rule="sample_and_match")])
    del batch["nodes", "log_probs"]
    with pytest.raises(ValueError, match=r"'acceptance_reward' needs \('nodes', 'log_probs'\) in the batch"):
        AcceptanceRewardLoss(EnumerableDrafter(0), target.head)(batch)
    loss = AcceptanceRewardLoss(EnumerableDrafter(0), target.head)
    batch["nodes", "behaviour"] = torch.zeros(1)
    loss.set_keys(log_probs=("nodes", "behaviour"))
    assert ("nodes", "behaviour") in loss.in_keys and torch.isfinite(loss(batch)["loss_acceptance_reward"])
    with pytest.raises(ValueError, match="colour"):
        loss.set_keys(colour="red")


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss, ExpectedLengthLoss, AcceptanceRewardLoss])
def test_whatever_is_missing_has_a_source(kind: type[Objective]) -> None:
    drafter, head = eagle3_and_head()
    loss = kind(drafter, head)
    whole = pack([trajectory_of(drafter, shape=TreeShape(3, 2, mode="sampled"))])
    trees = r"records it: serve with speculation \(drafter.depth above 0, baseline.share below 1\)$"
    sources = {
        **dict.fromkeys(loss.reads, "it is recorded with every request"),
        **{key: trees for key in loss.reads if key[0] in ("rounds", "nodes")},
        ("nodes", "log_probs"): "one that drafts by argmax has none",
        ("sequence", "hidden"): "an engine supplies it, or topk_ids",
        ("nodes", "hidden"): "an engine supplies it, or topk_ids",
    }
    for key in set(loss.reads) - set(loss.optional_reads):
        batch = whole.clone()
        del batch[key]
        with pytest.raises(ValueError, match=f"^objective '{kind.name}' needs {re.escape(str(key))} .*{sources[key]}"):
            loss(batch)


def test_the_source_of_a_renamed_entry() -> None:
    drafter, head = eagle3_and_head()
    loss = DiscardSamplingLoss(drafter, head)
    loss.set_keys(accepted="kept")
    with pytest.raises(ValueError, match="'discard' needs kept in the batch, .*serve with speculation"):
        loss(pack([trajectory_of(drafter)]))


class NeedsAColour(ImitationLoss):
    """Reads an entry that nothing here records."""

    @property
    def reads(self) -> list:
        return [*super().reads, "colour"]


def test_an_entry_of_unknown_source_is_named() -> None:
    drafter, head = eagle3_and_head()
    with pytest.raises(ValueError, match="'imitation' needs colour in the batch, which has no such entry$"):
        NeedsAColour(drafter, head)(pack([trajectory_of(drafter)]))


@pytest.mark.parametrize("reduction", ["average", "", None])
def test_reductions(reduction: Any) -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none'"):
        ImitationLoss(EnumerableDrafter(0), EnumerableTarget(0).head, reduction=reduction)


def test_losses_can_be_copied_and_cast() -> None:
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter)])
    make: list[Callable[[], Objective]] = [lambda k=k, s=s: k(drafter, head, **s) for k, s in SETTINGS[:10]]  # type: ignore[misc]
    for each in make:
        loss = each()
        key = f"loss_{loss.name}"
        torch.testing.assert_close(copy.deepcopy(loss)(batch)[key], loss(batch)[key])
        assert "head" not in loss.state_dict()  # the target's, not to be saved with the drafter
        assert copy.deepcopy(loss).float()(batch)[key].dtype == torch.float32


# ---- what is not a number, and what has the wrong form ---------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_k=3), SamplingParams(1.0, top_p=0.9, min_p=0.1)],
    ids=["greedy", "sampled", "top_k", "top_p and min_p"],
)
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *SETTINGS[:-1],  # recorded rewards do not ask the target
        (ImitationLoss, {"target": "served"}),
        (DiscardSamplingLoss, {"target": "served"}),
        *((ImitationLoss, {"target": "served", "divergence": name}) for name in DIVERGENCES),
    ],
    ids=lambda x: x.name if isinstance(x, type) else str(x),
)
def test_a_target_that_is_not_a_number_shows_in_the_loss(
    kind: type[Objective], settings: dict[str, Any], sampling: SamplingParams
) -> None:
    """So that the step is skipped and counted."""
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter, shape=TreeShape(3, 2, mode="sampled"), sampling_params=sampling)])
    batch["sequence", "hidden"][2] = torch.nan
    batch["nodes", "hidden"].fill_(torch.nan)
    assert bool(kind(drafter, head, **settings)(batch)[f"loss_{kind.name}"].isnan())


class InfiniteWhereItDoesNotCount(ImitationLoss):
    """In its values or its weights."""

    weights = False

    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        value, weight = found.value, found.weight.expand_as(found.value)
        if self.weights:
            return found._replace(value=value, weight=torch.where(found.valid, weight, torch.inf))
        return found._replace(value=torch.where(found.valid, value, torch.inf))


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_infinite_at_invalid_positions_does_not_count(
    weights: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InfiniteWhereItDoesNotCount, "weights", weights)
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter)])
    found = []
    for kind in (InfiniteWhereItDoesNotCount, ImitationLoss):
        loss = kind(drafter, head, reduction=reduction)(batch)["loss_imitation"]
        learned = [p for p in drafter.parameters() if p.requires_grad]
        found.append([loss.detach(), *torch.autograd.grad(loss, learned)])
    assert bool(torch.isfinite(found[0][0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss, ExpectedLengthLoss, AcceptanceRewardLoss])
def test_a_trajectory_is_no_batch(kind: type[Objective]) -> None:
    drafter, head = eagle3_and_head()
    message = rf"objective '{kind.name}' takes a batch, and this is one trajectory; give it pack\(\[...\]\)"
    with pytest.raises(ValueError, match=message):
        kind(drafter, head)(trajectory_of(drafter))


class Nameless(Objective):
    """Not registered."""

    @property
    def reads(self) -> list:
        return ImitationLoss.reads.fget(self)

    def values(self, batch: TensorDictBase) -> Values:
        raise NotImplementedError


def test_an_objective_needs_a_name() -> None:
    with pytest.raises(ValueError, match=r"Nameless has no name; give it one by @register_objective"):
        Nameless(EnumerableDrafter(0), EnumerableTarget(0).head)


class OfOneDimension(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(value=found.value[0], valid=found.valid[0])


class OfTwoShapes(ImitationLoss):
    def values(self, batch: TensorDictBase) -> Values:
        found = super().values(batch)
        return found._replace(valid=found.valid[:1])


@pytest.mark.parametrize(
    ("kind", "shapes"), [(OfOneDimension, r"\[12\] and \[12\]"), (OfTwoShapes, r"\[3, 12\] and \[1, 12\]")]
)
def test_values_come_in_groups(kind: type[Objective], shapes: str) -> None:
    drafter, head = eagle3_and_head()
    with pytest.raises(ValueError, match=rf"both be \[G, X\], groups of positions, got {shapes}; value\[None\] is one"):
        kind(drafter, head)(pack([trajectory_of(drafter)]))


WEIGHTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "misshapen": (
        lambda w: w.expand(3, 12).T,
        r"weight must broadcast to value, \[3, 12\], got \[12, 3\]; a weight of",
    ),
    "too many": (lambda w: w.expand(3, 12)[None], r"weight must broadcast to value, \[3, 12\], got \[1, 3, 12\]"),
    "learned": (lambda w: w.clone().requires_grad_(), "weight has a gradient, .*; detach it"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_fit_the_values_and_do_not_learn(case: str) -> None:
    change, message = WEIGHTS[case]

    class Weighted(ImitationLoss):
        def position_weights(self, batch: TensorDictBase, unroll: Unroll, law: Target) -> Tensor:
            return change(super().position_weights(batch, unroll, law))

    drafter, head = eagle3_and_head()
    with pytest.raises(ValueError, match=rf"objective 'imitation': {message}"):
        Weighted(drafter, head)(pack([trajectory_of(drafter)]))


def test_features_of_another_drafter_are_named() -> None:
    drafter, head = eagle3_and_head()
    one_layer = Eagle3Drafter.from_target(
        TargetParts.of(tiny_target()), draft_vocab=torch.arange(16), feature_layers=(1,)
    )
    batch = pack([trajectory_of(one_layer.double())])
    message = r"objective 'imitation': the recorded features are 16 wide, and the drafter reads 32, 2 layers \(.*\) of"
    with pytest.raises(ValueError, match=message):
        ImitationLoss(drafter, head)(batch)


@pytest.mark.parametrize(
    ("drafts", "judges"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=lambda x: x.name if isinstance(x, type) else str(x))
def test_the_head_may_have_another_dtype(
    kind: type[Objective], settings: dict[str, Any], drafts: torch.dtype, judges: torch.dtype
) -> None:
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter, shape=TreeShape(3, 2, mode="sampled"))])
    exact, cast = (
        kind(drafter.to(dtype), head.to(of), **settings)(batch)[f"loss_{kind.name}"]
        for dtype, of in ((torch.float64, torch.float64), (drafts, judges))
    )
    cast.backward()
    # Eight bits of a logit of 5 are off by 0.02 at most, and these losses by a few times that.
    tolerance = 0.1 if judges == torch.bfloat16 else 1e-4
    torch.testing.assert_close(cast.double(), exact, atol=tolerance, rtol=tolerance)

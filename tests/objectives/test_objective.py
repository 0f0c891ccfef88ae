"""The objective seam: conformance of all objectives, names, settings and sums."""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora_rl.objectives import (
    DIVERGENCES,
    AcceptanceRewardLoss,
    DiscardSamplingLoss,
    ExpectedLengthLoss,
    ImitationLoss,
    Objective,
    SumLoss,
    check_settings,
    get_objective,
    make_objectives,
    objective,
    register_objective,
)
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import check_objective, tiny_target, tiny_trajectory
from aurora_rl.testing.tabular import DrawnTree, TabularDrafter, TabularTarget, tree_trajectory
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
        follows_sampling=settings.get("rule") != "greedy",
    )


@pytest.mark.parametrize(("kind", "settings"), SETTINGS, ids=lambda x: x.name if isinstance(x, type) else str(x))
def test_requests_that_nothing_was_drafted_for(kind: type[Objective], settings: dict[str, Any]) -> None:
    # As a server makes them while speculation does not pay.
    drafter, head = made()
    loss = kind(drafter, head, **settings)
    shape = TreeShape(0, mode="sampled" if kind.sampled else "topk")
    batch = pack([tiny_trajectory(drafter, shape=shape, request=i) for i in range(2)])
    assert not len(batch["nodes", "tokens"])
    for _ in range(25):  # more than an objective with a limit on staleness waits for fresh trees
        value = loss(batch)[f"loss_{kind.name}"]
        value.backward()
    gradients = [p.grad for p in drafter.parameters() if p.grad is not None]
    assert bool(torch.isfinite(value)) and gradients and all(bool(torch.isfinite(g).all()) for g in gradients)
    # The text teaches all the same; trees, of which there are none, do not.
    from_text = kind is ImitationLoss or (kind is ExpectedLengthLoss and settings.get("contexts") != "trees")
    assert any(bool(g.any()) for g in gradients) == from_text


@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_with_every_divergence(divergence: str) -> None:
    check_objective(
        lambda d, head, reduction: DiscardSamplingLoss(d, head, divergence=divergence, reduction=reduction),
        differentiable=divergence != "hybrid_overlap",  # its weight is held constant
    )


# ---- names and settings -----------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, type[Objective]]:
    fresh = dict(objective.OBJECTIVES)
    monkeypatch.setattr(objective, "OBJECTIVES", fresh)
    return fresh


def test_names(registry: dict[str, type[Objective]]) -> None:
    assert set(registry) == {"imitation", "discard", "acceptance_reward", "expected_length"}
    assert get_objective("discard") is DiscardSamplingLoss
    with pytest.raises(ValueError, match="no objective is called 'imitaton'; did you mean 'imitation'[?]"):
        get_objective("imitaton")
    with pytest.raises(ValueError, match="'imitation' belongs to ImitationLoss; choose another"):
        register_objective("imitation")(type("Usurper", (ImitationLoss,), {}))


def test_entry_points(registry: dict[str, type[Objective]], monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == "aurora_rl.objectives"
        return [
            importlib.metadata.EntryPoint("theirs", "test_entry_points_module:Theirs", group),
            importlib.metadata.EntryPoint("broken", "collections:Counter", group),
        ]

    module = type(importlib)("test_entry_points_module")
    module.Theirs = type("Theirs", (ImitationLoss,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "test_entry_points_module", module)
    monkeypatch.setattr(objective, "entry_points", points)
    assert get_objective("theirs").name == "theirs"
    with pytest.raises(ValueError, match="entry point 'broken' is collections:Counter, which is no subclass"):
        get_objective("broken")
    with pytest.raises(ValueError, match="did you mean 'theirs'"):
        get_objective("thiers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "an objective needs a name, got {}"),
        ({"name": "discrad"}, "did you mean 'discard'"),
        ({"name": "imitation", "step": 3}, "objective 'imitation' has no setting 'step'; did you mean 'steps'"),
        ({"name": "imitation", "reduction": "sum"}, "has no setting 'reduction'"),
        ({"name": "imitation", "head": 1}, "has no setting 'head'"),
    ],
)
def test_settings_are_checked_before_anything_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(settings)


def test_values_of_settings_are_checked_by_the_class() -> None:
    drafter, head = TabularDrafter(0), TabularTarget(0).head
    with pytest.raises(ValueError, match="imitation needs steps >= 1"):
        make_objectives([{"name": "imitation", "steps": 0}], drafter, head)
    with pytest.raises(ValueError, match="weight must be finite, got nan"):
        make_objectives([{"name": "imitation", "weight": float("nan")}], drafter, head)
    with pytest.raises(ValueError, match="objective 'imitation': '<' not supported"):
        make_objectives([{"name": "imitation", "steps": "three"}], drafter, head)


# ---- sums ---------------------------------------------------------------------------------------------------------


def made() -> tuple[Drafter, Tensor]:
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target())
    return Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, 32, 2)).double(), parts.head


def test_a_sum_is_its_parts() -> None:
    drafter, head = made()
    batch = pack([tiny_trajectory(drafter, request=i) for i in range(2)])
    settings: list[dict[str, Any]] = [
        {"name": "imitation", "steps": 2},
        {"name": "discard", "weight": 0.25},
        {"name": "imitation", "divergence": "reverse_kl"},
    ]
    loss = SumLoss(make_objectives(settings, drafter, head))
    out = loss(batch)
    assert list(out.keys()) == loss.out_keys == [
        "loss_imitation", "agreement", "loss_discard", "discarded", "discard_agreement", "loss_imitation_2",
        "agreement_2",
    ]  # fmt: skip
    parts = [
        ImitationLoss(drafter, head, steps=2), DiscardSamplingLoss(drafter, head),
        ImitationLoss(drafter, head, divergence="reverse_kl"),
    ]  # fmt: skip
    for key, part, factor in zip(("imitation", "discard", "imitation_2"), parts, (1, 0.25, 1), strict=True):
        torch.testing.assert_close(out[f"loss_{key}"], factor * part(batch)[f"loss_{part.name}"])
    assert set(loss.in_keys) == {key for part in parts for key in part.in_keys}
    # The drafter they share learns once.
    assert len(list(loss.parameters())) == len(list(drafter.parameters()))
    with pytest.raises(ValueError, match="objectives is empty"):
        SumLoss([])
    with pytest.raises(AttributeError, match="set them there"):
        loss.in_keys = []


def test_a_missing_entry_is_named() -> None:
    target = TabularTarget(0)
    batch = pack([tree_trajectory(DrawnTree((-1,), (0,)), target, rule="sample_and_match")])
    del batch["nodes", "log_probs"]
    with pytest.raises(ValueError, match=r"'acceptance_reward' needs \('nodes', 'log_probs'\) in the batch"):
        AcceptanceRewardLoss(TabularDrafter(0), target.head)(batch)
    loss = AcceptanceRewardLoss(TabularDrafter(0), target.head)
    batch["nodes", "behaviour"] = torch.zeros(1)
    loss.set_keys(log_probs=("nodes", "behaviour"))
    assert ("nodes", "behaviour") in loss.in_keys and torch.isfinite(loss(batch)["loss_acceptance_reward"])
    with pytest.raises(ValueError, match="colour"):
        loss.set_keys(colour="red")


@pytest.mark.parametrize("reduction", ["average", "", None])
def test_reductions(reduction: Any) -> None:
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sum' or 'none'"):
        ImitationLoss(TabularDrafter(0), TabularTarget(0).head, reduction=reduction)


def test_losses_can_be_copied_and_cast() -> None:
    drafter, head = made()
    batch = pack([tiny_trajectory(drafter)])
    make: list[Callable[[], Objective]] = [lambda k=k, s=s: k(drafter, head, **s) for k, s in SETTINGS[:10]]  # type: ignore[misc]
    for each in make:
        loss = each()
        key = f"loss_{loss.name}"
        torch.testing.assert_close(copy.deepcopy(loss)(batch)[key], loss(batch)[key])
        assert "head" not in loss.state_dict()  # the target's, not to be saved with the drafter
        assert copy.deepcopy(loss).float()(batch)[key].dtype == torch.float32

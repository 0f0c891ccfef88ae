"""The objective seam: conformance of all objectives, names, settings and sums."""

from __future__ import annotations

import copy
import importlib.metadata
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from tensordict.utils import NestedKey
from torch import Tensor

from aurora_rl import registry as by_name
from aurora_rl import tree_index
from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import (
    DIVERGENCES,
    OBJECTIVES,
    AcceptanceRewardLoss,
    DiscardSamplingLoss,
    ExpectedLengthLoss,
    ImitationLoss,
    Objective,
    SumLoss,
    Values,
    check_settings,
    get_objective,
    make_objectives,
    register_objective,
)
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape, Unroll
from aurora_rl.registry import Registry
from aurora_rl.testing import check_objective, tiny_target, tiny_trajectory
from aurora_rl.testing.enumerable_worlds import DrawnTree, TabularDrafter, TabularTarget, tree_trajectory
from aurora_rl.trajectories import pack
from aurora_rl.trees import depths

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
    drafter, head = made()
    loss = kind(drafter, head, **settings)
    shape = TreeShape(0, mode="sampled" if kind.sampled else "topk")
    batch = pack([tiny_trajectory(drafter, shape=shape, request=i) for i in range(2)])
    assert not len(batch["nodes", "tokens"])
    from_text = kind is ImitationLoss or (kind is ExpectedLengthLoss and settings.get("contexts") != "trees")
    for _ in range(20):
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
        drafted = pack([tiny_trajectory(drafter, shape=TreeShape(2, 2, mode=shape.mode))])
        fresh = kind(drafter, head, **settings)
        fresh(drafted)
        for _ in range(25):
            fresh(batch)


@pytest.mark.parametrize("divergence", DIVERGENCES.names())
def test_with_every_divergence(divergence: str) -> None:
    check_objective(
        lambda d, head, reduction: DiscardSamplingLoss(d, head, divergence=divergence, reduction=reduction),
        differentiable=divergence != "hybrid_overlap",  # its weight is held constant
    )


OVERLAPS = {"total_variation", "negative_log_overlap", "hybrid_overlap", "missed_probability"}


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss])
def test_overlaps_keep_the_mass_of_the_whole_vocabulary(kind: type[Objective]) -> None:
    drafter, head = made()
    batch = pack([tiny_trajectory(drafter)])
    for name in DIVERGENCES:
        default, whole, part = (
            kind(drafter, head, divergence={"name": name}, **settings)(batch)[f"loss_{kind.name}"]
            for settings in ({}, {"renormalize": False}, {"renormalize": True})
        )
        assert whole != part or name == "cross_entropy"
        assert default == (whole if name in OVERLAPS else part)
        assert kind(drafter, head, divergence=name, renormalize=name in OVERLAPS).renormalize == (name in OVERLAPS)


# ---- names and settings -----------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[type[Objective]]:
    for table in ("_parts", "_sources"):
        monkeypatch.setattr(OBJECTIVES, table, dict(getattr(OBJECTIVES, table)))
    return OBJECTIVES


def test_names(registry: Registry[type[Objective]]) -> None:
    assert set(registry) == {"imitation", "discard", "acceptance_reward", "expected_length"}
    assert get_objective("discard") is DiscardSamplingLoss
    with pytest.raises(ValueError, match="no objective is called 'imitaton'; did you mean 'imitation'[?]"):
        get_objective("imitaton")


def test_a_class_by_its_import_path(
    registry: Registry[type[Objective]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_losses.py").write_text(
        "from aurora_rl.objectives import ImitationLoss, register_objective\n"
        "class Plain(ImitationLoss):\n    pass\n"
        "@register_objective('known')\nclass Known(ImitationLoss):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert check_settings({"name": "own_losses:Plain", "steps": 2}).name == "Plain"
    assert get_objective("own_losses:Known").name == "known"
    with pytest.raises(ValueError, match="'own_losses:Plane' cannot be imported: .*has no attribute 'Plane'"):
        get_objective("own_losses:Plane")
    with pytest.raises(ValueError, match="'pathlib:Path' is pathlib:Path, which is no subclass of .*.Objective"):
        get_objective("pathlib:Path")
    with pytest.raises(ValueError, match="did you mean 'own_losses:Plain'.*and any package.module:Class"):
        get_objective("own_losses.Plain")


@pytest.mark.parametrize("qualname", ["Usurper", "ImitationLoss"])  # the second is the built-in's, of another module
def test_a_name_that_is_taken(registry: Registry[type[Objective]], qualname: str) -> None:
    usurper = type(qualname, (DiscardSamplingLoss,), {"__module__": "theirs"})
    owner = "aurora_rl.objectives.imitation:ImitationLoss"
    with pytest.raises(ValueError, match=f"'imitation' belongs to {owner}; choose another for theirs:{qualname}"):
        register_objective("imitation")(usurper)
    assert registry.get("imitation") is ImitationLoss and usurper.name == "discard"


def test_a_class_that_is_defined_again_replaces_itself(registry: Registry[type[Objective]]) -> None:
    cells = [type("Mine", (ImitationLoss,), {"__module__": "__main__"}) for _ in range(2)]
    assert [register_objective("mine")(cell) for cell in cells] == cells
    assert get_objective("mine") is cells[1] and cells[1].name == "mine"


def test_entry_points(registry: Registry[type[Objective]], monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == "aurora_rl.objectives"
        return [
            importlib.metadata.EntryPoint("theirs", "test_entry_points_module:Theirs", group),
            importlib.metadata.EntryPoint("broken", "collections:Counter", group),
        ]

    module = type(importlib)("test_entry_points_module")
    module.Theirs = type("Theirs", (ImitationLoss,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "test_entry_points_module", module)
    monkeypatch.setattr(by_name, "entry_points", points)
    assert get_objective("theirs").name == "theirs"
    with pytest.raises(ValueError, match="objective 'broken' is collections:Counter, which is no subclass"):
        get_objective("broken")
    with pytest.raises(ValueError, match="did you mean 'theirs'"):
        get_objective("thiers")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "an objective needs a name, got {}"),
        ({"name": 3}, "an objective needs a name, got {'name': 3}"),
        ({"name": "discrad"}, "did you mean 'discard'"),
        ({"name": "imitation", "step": 3}, "objective 'imitation' has no setting 'step'; did you mean 'steps'"),
        ({"name": "imitation", "reduction": "sum"}, "has no setting 'reduction'"),
        ({"name": "imitation", "head": 1}, "has no setting 'head'"),
    ],
)
def test_settings_are_checked_before_anything_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_settings(settings)


def test_an_objective_that_passes_settings_on_has_those_of_its_parents(registry: Registry[type[Objective]]) -> None:
    @register_objective("focal")
    class Focal(ImitationLoss):
        def __init__(self, drafter: Drafter, head: Tensor, *, gamma: float = 1.0, **settings: Any) -> None:
            super().__init__(drafter, head, **settings)
            self.gamma = gamma

    @register_objective("stubborn")
    class Stubborn(Focal):
        def __init__(self, drafter: Drafter, head: Tensor, *, zeal: float = 1.0) -> None:
            super().__init__(drafter, head, steps=1)

    assert check_settings({"name": "focal", "steps": 2, "gamma": 2.0, "weight": 0.5}) is Focal
    (made,) = make_objectives([{"name": "focal", "steps": 2}], TabularDrafter(0), TabularTarget(0).head)
    assert isinstance(made, Focal) and made.steps == 2
    with pytest.raises(ValueError, match="objective 'focal' has no setting 'step'; did you mean 'steps'"):
        check_settings({"name": "focal", "step": 2})
    with pytest.raises(ValueError, match="objective 'focal' has no setting 'settings'"):
        check_settings({"name": "focal", "settings": {}})
    with pytest.raises(ValueError, match="objective 'stubborn' has no setting 'steps'"):
        check_settings({"name": "stubborn", "steps": 2})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "imitation", "divergence": "forwardkl"}, "no divergence is called 'forwardkl'; did you mean 'forw"),
        ({"name": "imitation", "steps": 0}, "steps must be at least 1, got 0"),
        ({"name": "imitation", "steps": "three"}, "steps must be an integer, got 'three'"),
        ({"name": "imitation", "steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"name": "imitation", "steps": True}, "steps must be an integer, got True"),
        ({"name": "imitation", "renormalize": "no"}, "renormalize must be true or false or null, got 'no'"),
        ({"name": "imitation", "divergence": {"name": "skewed_kl", "skew": 2}}, r"skew must lie in \[0, 1\), got 2"),
        ({"name": "imitation", "divergence": 3}, "divergence must be a string or a mapping or a function, got 3"),
        ({"name": "imitation", "weighting": "foo"}, "weighting must be 'decay' or 'expected_length', got 'foo'"),
        ({"name": "imitation", "weight": math.nan}, "weight must be finite, got nan"),
        ({"name": "imitation", "weight": "heavy"}, "weight must be a number, got 'heavy'"),
        ({"name": "acceptance_reward", "clip": -1}, "clip must be positive or null, got -1"),
        ({"name": "acceptance_reward", "clip": "no"}, "clip must be a number or null, got 'no'"),
        ({"name": "acceptance_reward", "baseline": "loo"}, "must be 'none', 'leave_one_out' or 'group', got 'loo'"),
        ({"name": "expected_length", "rule": "typical"}, "no verification rule is called 'typical'; did you mean"),
        ({"name": "discard", "divergence": "forwardkl"}, "did you mean 'forward_kl'"),
    ],
    ids=str,
)  # fmt: skip
def test_values_of_settings_are_checked_before_anything_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^objective '{settings['name']}': .*{message}"):
        check_settings(settings)
    with pytest.raises(ValueError, match=f"^objective '{settings['name']}': .*{message}"):
        make_objectives([settings], TabularDrafter(0), TabularTarget(0).head)


def test_what_is_right_is_not_refused() -> None:
    for kind, settings in SETTINGS:
        assert check_settings({"name": kind.name, **settings}) is kind
    assert check_settings({"name": "imitation", "weight": 1}) is ImitationLoss  # YAML's 1 is a number too
    assert check_settings({"name": "acceptance_reward", "clip": None}) is AcceptanceRewardLoss


def test_a_constructor_that_reads_its_drafter_is_checked_later(registry: Registry[type[Objective]]) -> None:
    @register_objective("sized")
    class Sized(ImitationLoss):
        def __init__(self, drafter: Drafter, head: Tensor, *, top_k: Unresolvable = 1) -> None:  # type: ignore[name-defined] # noqa: F821
            super().__init__(drafter, head)
            next(drafter.parameters())
            if top_k > len(drafter.draft_vocab):
                raise ValueError(f"top_k must be at most {len(drafter.draft_vocab)}, got {top_k}")

    assert check_settings({"name": "sized", "top_k": 9}) is Sized
    with pytest.raises(ValueError, match="objective 'sized': top_k must be at most 3, got 9"):
        make_objectives([{"name": "sized", "top_k": 9}], TabularDrafter(0), TabularTarget(0).head)
    with pytest.raises(ValueError, match="objective 'sized': '>' not supported between instances of 'str'"):
        make_objectives([{"name": "sized", "top_k": "x"}], TabularDrafter(0), TabularTarget(0).head)


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


def test_a_sum_derives_the_index_of_trees_once(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, head = made()
    batch, derived = pack([tiny_trajectory(drafter, shape=TreeShape(2, 2))]), []
    monkeypatch.setattr(tree_index, "depths", lambda parents: derived.append(1) or depths(parents))
    names = ["discard", "expected_length", "discard"]
    parts = make_objectives(
        [{"name": name, **({"contexts": "trees"} if name == "expected_length" else {})} for name in names],
        drafter,
        head,
    )
    keys = set(batch.keys(include_nested=True))
    out = SumLoss(parts)(batch)
    assert len(derived) == 1 and set(batch.keys(include_nested=True)) == keys
    for key, part in zip(("discard", "expected_length", "discard_2"), parts, strict=True):
        assert torch.equal(out[f"loss_{key}"], part(batch)[f"loss_{part.name}"])
    assert len(derived) == 4
    del batch["nodes", "parents"]
    with pytest.raises(ValueError, match=r"'discard' needs \('nodes', 'parents'\) in the batch"):
        SumLoss(parts)(batch)


def test_a_sum_renames_entries_of_its_objectives() -> None:
    @dataclass
    class Keys(Objective._AcceptedKeys):
        teacher: NestedKey = ("sequence", "teacher")

    class Taught(ImitationLoss):
        _AcceptedKeys = default_keys = Keys  # type: ignore[assignment, misc]

    drafter, head = made()
    first, second = ImitationLoss(drafter, head), Taught(drafter, head)
    total = SumLoss([first, second])
    total.set_keys(hidden=("teacher", "hidden"), teacher=("teacher", "tokens"))
    assert first.tensor_keys.hidden == second.tensor_keys.hidden == ("teacher", "hidden")
    assert second.tensor_keys.teacher == ("teacher", "tokens")  # type: ignore[attr-defined]
    assert ("teacher", "hidden") in total.in_keys and ("sequence", "hidden") not in total.in_keys
    batch = pack([tiny_trajectory(drafter)])
    expected = ImitationLoss(drafter, head)(batch)["loss_imitation"]
    batch["teacher"] = {"hidden": batch["sequence"].pop("hidden")}
    torch.testing.assert_close(total(batch)["loss_imitation"], expected)
    with pytest.raises(
        ValueError, match="colour is not an accepted tensordict key; the objectives have hidden, node_h"
    ):
        total.set_keys(hidden=None, colour="red")
    assert first.tensor_keys.hidden == ("teacher", "hidden")  # nothing is renamed if anything is wrong
    total.set_keys(hidden=None)
    assert first.tensor_keys.hidden == ("sequence", "hidden")


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


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss, ExpectedLengthLoss, AcceptanceRewardLoss])
def test_whatever_is_missing_has_a_source(kind: type[Objective]) -> None:
    drafter, head = made()
    loss = kind(drafter, head)
    whole = pack([tiny_trajectory(drafter, shape=TreeShape(3, 2, mode="sampled"))])
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
    drafter, head = made()
    loss = DiscardSamplingLoss(drafter, head)
    loss.set_keys(accepted="kept")
    with pytest.raises(ValueError, match="'discard' needs kept in the batch, .*serve with speculation"):
        loss(pack([tiny_trajectory(drafter)]))


class NeedsAColour(ImitationLoss):
    """Reads an entry that nothing here records."""

    @property
    def reads(self) -> list:
        return [*super().reads, "colour"]


def test_an_entry_of_unknown_source_is_named() -> None:
    drafter, head = made()
    with pytest.raises(ValueError, match="'imitation' needs colour in the batch, which has no such entry$"):
        NeedsAColour(drafter, head)(pack([tiny_trajectory(drafter)]))


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


# ---- what is not a number, and what has the wrong form ---------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(1.0), SamplingParams(1.0, top_k=3), SamplingParams(1.0, top_p=0.9)],
    ids=["greedy", "sampled", "top_k", "top_p"],
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
    drafter, head = made()
    batch = pack([tiny_trajectory(drafter, shape=TreeShape(3, 2, mode="sampled"), sampling=sampling)])
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
    drafter, head = made()
    batch = pack([tiny_trajectory(drafter)])
    found = []
    for kind in (InfiniteWhereItDoesNotCount, ImitationLoss):
        loss = kind(drafter, head, reduction=reduction)(batch)["loss_imitation"]
        learned = [p for p in drafter.parameters() if p.requires_grad]
        found.append([loss.detach(), *torch.autograd.grad(loss, learned)])
    assert bool(torch.isfinite(found[0][0]))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("kind", [ImitationLoss, DiscardSamplingLoss, ExpectedLengthLoss, AcceptanceRewardLoss])
def test_a_trajectory_is_no_batch(kind: type[Objective]) -> None:
    drafter, head = made()
    message = rf"objective '{kind.name}' takes a batch, and this is one trajectory; give it pack\(\[...\]\)"
    with pytest.raises(ValueError, match=message):
        kind(drafter, head)(tiny_trajectory(drafter))


class Nameless(Objective):
    """Not registered."""

    @property
    def reads(self) -> list:
        return ImitationLoss.reads.fget(self)

    def values(self, batch: TensorDictBase) -> Values:
        raise NotImplementedError


def test_an_objective_needs_a_name() -> None:
    with pytest.raises(ValueError, match=r"Nameless has no name; give it one by @register_objective"):
        Nameless(TabularDrafter(0), TabularTarget(0).head)


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
    drafter, head = made()
    with pytest.raises(ValueError, match=rf"both be \[G, X\], groups of positions, got {shapes}; value\[None\] is one"):
        kind(drafter, head)(pack([tiny_trajectory(drafter)]))


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
        def position_weights(self, batch: TensorDictBase, unroll: Unroll, log_p: Tensor) -> Tensor:
            return change(super().position_weights(batch, unroll, log_p))

    drafter, head = made()
    with pytest.raises(ValueError, match=rf"objective 'imitation': {message}"):
        Weighted(drafter, head)(pack([tiny_trajectory(drafter)]))


def test_features_of_another_drafter_are_named() -> None:
    drafter, head = made()
    other = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16), feature_layers=(1,))
    batch = pack([tiny_trajectory(other.double())])
    message = (
        r"objective 'imitation': the recorded features are 16 wide, of 1 layers, and the drafter reads 32, of 2 layers"
    )
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
    drafter, head = made()
    batch = pack([tiny_trajectory(drafter, shape=TreeShape(3, 2, mode="sampled"))])
    one, other = (
        kind(drafter.to(dtype), head.to(of), **settings)(batch)[f"loss_{kind.name}"]
        for dtype, of in ((torch.float64, torch.float64), (drafts, judges))
    )
    other.backward()
    # Eight bits of a logit of 5 are off by 0.02 at most, and these losses by a few times that.
    tolerance = 0.1 if judges == torch.bfloat16 else 1e-4
    torch.testing.assert_close(other.double(), one, atol=tolerance, rtol=tolerance)

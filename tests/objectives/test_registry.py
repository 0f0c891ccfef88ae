"""Objectives by name, import path or entry point, with settings that are checked before anything is made."""

from __future__ import annotations

import importlib.metadata
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from aurora_rl import registry as by_name
from aurora_rl.objectives import (
    OBJECTIVES,
    DiscardSamplingLoss,
    ImitationLoss,
    Windows,
    check_settings,
    get_objective,
    make_objectives,
    register_objective,
)
from aurora_rl.policies import Drafter
from aurora_rl.testing import tiny_batch
from aurora_rl.testing.enumerable_worlds import EnumerableDrafter, EnumerableTarget


def test_names() -> None:
    # plain_kl is of a doctest, where that ran in this process before.
    assert set(OBJECTIVES) - {"plain_kl"} == {"imitation", "discard", "acceptance_reward", "expected_length"}
    assert get_objective("discard") is DiscardSamplingLoss
    with pytest.raises(ValueError, match="no objective is called 'imitaton'; did you mean 'imitation'[?]"):
        get_objective("imitaton")


def test_a_class_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with pytest.raises(ValueError, match="did you mean 'own_losses:Plain'.*and any package.module:Thing"):
        get_objective("own_losses.Plain")


def test_an_error_of_a_function_names_its_objective_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_parts.py").write_text(
        "def wrongshape(log_p, log_q, windows):\n    return log_q.sum(), windows.valid\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="^objective 'own_parts:wrongshape': its function must return values and a"):
        check_settings({"name": "own_parts:wrongshape"})


@pytest.mark.parametrize("qualname", ["Usurper", "ImitationLoss"])  # the second is the built-in's, of another module
def test_a_name_that_is_taken(qualname: str) -> None:
    usurper = type(qualname, (DiscardSamplingLoss,), {"__module__": "third_party"})
    owner = "aurora_rl.objectives.imitation:ImitationLoss"
    with pytest.raises(ValueError, match=f"'imitation' belongs to {owner}; choose another for third_party:{qualname}"):
        register_objective("imitation")(usurper)
    assert OBJECTIVES.get("imitation") is ImitationLoss and usurper.name == "discard"


def test_a_class_that_is_defined_again_replaces_itself() -> None:
    cells = [type("Mine", (ImitationLoss,), {"__module__": "__main__"}) for _ in range(2)]
    assert [register_objective("mine")(cell) for cell in cells] == cells
    assert get_objective("mine") is cells[1] and cells[1].name == "mine"


def test_a_class_keeps_its_name() -> None:
    kept = type("Kept", (ImitationLoss,), {"__module__": "third_party"})
    drafter, head, _ = tiny_batch()
    loss = register_objective("kept")(kept)(drafter, head)
    with pytest.raises(ValueError, match="third_party:Kept is the objective 'kept' already; use that name in"):
        register_objective("other")(kept)
    assert loss.name == "kept" and loss.out_keys[0] == "loss_kept"


def test_the_class_of_a_function_has_one_name() -> None:
    @register_objective("k1")
    def k1(log_p: Tensor, log_q: Tensor, windows: Windows) -> tuple[Tensor, Tensor]:
        return log_p[..., 0] - log_q[..., 0], windows.valid

    with pytest.raises(ValueError, match="is the objective 'k1' already; use that name in the place of 'k2'"):
        register_objective("k2")(get_objective("k1"))
    assert get_objective("k1").name == "k1"


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    def points(group: str) -> list[importlib.metadata.EntryPoint]:
        assert group == "aurora_rl.objectives"
        return [
            importlib.metadata.EntryPoint("third_party", "test_entry_points_module:ThirdParty", group),
            importlib.metadata.EntryPoint("broken", "collections:Counter", group),
        ]

    module = type(importlib)("test_entry_points_module")
    module.ThirdParty = type("ThirdParty", (ImitationLoss,), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "test_entry_points_module", module)
    monkeypatch.setattr(by_name, "entry_points", points)
    assert get_objective("third_party").name == "third_party"
    with pytest.raises(ValueError, match="objective 'broken' is collections:Counter, which is no subclass"):
        get_objective("broken")
    with pytest.raises(ValueError, match="did you mean 'third_party'"):
        get_objective("thrid_party")


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


def test_an_objective_that_passes_settings_on_has_those_of_its_parents() -> None:
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
    (focal,) = make_objectives([{"name": "focal", "steps": 2}], EnumerableDrafter(0), EnumerableTarget(0).head)
    assert isinstance(focal, Focal) and focal.steps == 2
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
        ({"name": "imitation", "steps": "three"}, "steps must be an integer or null, got 'three'"),
        ({"name": "imitation", "steps": 2.5}, "steps must be an integer or null, got 2.5"),
        ({"name": "imitation", "steps": True}, "steps must be an integer or null, got True"),
        ({"name": "imitation", "renormalize": "no"}, "renormalize must be true or false or null, got 'no'"),
        ({"name": "imitation", "divergence": {"name": "skewed_kl", "skew": 2}}, r"skew must lie in \[0, 1\), got 2"),
        ({"name": "imitation", "divergence": 3}, "divergence must be a string or a mapping or a function, got 3"),
        ({"name": "imitation", "weighting": "foo"}, "weighting must be 'decay' or 'expected_length', got 'foo'"),
        ({"name": "imitation", "weight": math.nan}, "weight must be finite and not negative, got nan"),
        ({"name": "imitation", "weight": "heavy"}, "weight must be a number, got 'heavy'"),
        ({"name": "acceptance_reward", "clip": -1}, "clip must be positive or null, got -1"),
        ({"name": "acceptance_reward", "clip": "no"}, "clip must be a number or null, got 'no'"),
        ({"name": "acceptance_reward", "baseline": "loo"}, "must be 'none', 'leave_one_out' or 'group', got 'loo'"),
        ({"name": "expected_length", "rule": "typical"}, "no verification rule is called 'typical'; there are"),
        ({"name": "discard", "divergence": "forwardkl"}, "did you mean 'forward_kl'"),
    ],
    ids=str,
)  # fmt: skip
def test_values_of_settings_are_checked_before_anything_is_made(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^objective '{settings['name']}': .*{message}"):
        check_settings(settings)
    with pytest.raises(ValueError, match=f"^objective '{settings['name']}': .*{message}"):
        make_objectives([settings], EnumerableDrafter(0), EnumerableTarget(0).head)


def test_a_constructor_that_reads_its_drafter_is_checked_later() -> None:
    @register_objective("sized")
    class Sized(ImitationLoss):
        def __init__(self, drafter: Drafter, head: Tensor, *, top_k: Unresolvable = 1) -> None:  # type: ignore[name-defined] # noqa: F821
            super().__init__(drafter, head)
            next(drafter.parameters())
            if top_k > len(drafter.draft_vocab):
                raise ValueError(f"top_k must be at most {len(drafter.draft_vocab)}, got {top_k}")

    assert check_settings({"name": "sized", "top_k": 9}) is Sized
    with pytest.raises(ValueError, match="objective 'sized': top_k must be at most 3, got 9"):
        make_objectives([{"name": "sized", "top_k": 9}], EnumerableDrafter(0), EnumerableTarget(0).head)
    with pytest.raises(ValueError, match="objective 'sized': '>' not supported between instances of 'str'"):
        make_objectives([{"name": "sized", "top_k": "x"}], EnumerableDrafter(0), EnumerableTarget(0).head)

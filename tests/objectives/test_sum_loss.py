"""SumLoss: a sum is its parts, and renames their entries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tensordict.utils import NestedKey
from tiny_drafters import eagle3_and_head
from tiny_recordings import trajectory_of

from aurora_kernels.trees import depths
from aurora_rl import tree_index
from aurora_rl.objectives import DiscardSamplingLoss, ImitationLoss, Objective, SumLoss, make_objectives
from aurora_rl.policies import TreeShape
from aurora_rl.trajectories import pack


def test_a_sum_is_its_parts() -> None:
    drafter, head = eagle3_and_head()
    batch = pack([trajectory_of(drafter, request=i) for i in range(2)])
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
    drafter, head = eagle3_and_head()
    batch, derived = pack([trajectory_of(drafter, shape=TreeShape(2, 2))]), []
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

    drafter, head = eagle3_and_head()
    first, second = ImitationLoss(drafter, head), Taught(drafter, head)
    total = SumLoss([first, second])
    total.set_keys(hidden=("teacher", "hidden"), teacher=("teacher", "tokens"))
    assert first.tensor_keys.hidden == second.tensor_keys.hidden == ("teacher", "hidden")
    assert second.tensor_keys.teacher == ("teacher", "tokens")  # type: ignore[attr-defined]
    assert ("teacher", "hidden") in total.in_keys and ("sequence", "hidden") not in total.in_keys
    batch = pack([trajectory_of(drafter)])
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

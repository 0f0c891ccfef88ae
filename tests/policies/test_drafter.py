"""Checks of weights, and copies that serve: literal numbers."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aurora_rl.policies import Eagle3Drafter, MedusaDrafter, TargetParts, get_drafter
from aurora_rl.policies.drafter import check_weights, draft_rows
from aurora_rl.testing import tiny_target


def test_rows_of_tokens_in_the_draft_head() -> None:
    assert draft_rows(torch.tensor([9, 2, 5]), torch.tensor([[2, 9, 4], [0, 5, 31]])).tolist() == [
        [1, 0, -1],
        [-1, 2, -1],
    ]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"tensor 'a' \(2,\) is missing"),
        ({"a": torch.zeros(2)}, r"tensor 'b' \(1, 3\) is missing"),
        ({"a": torch.zeros(3), "b": torch.zeros(1, 3)}, r"tensor 'a' has shape \(3,\), this drafter needs \(2,\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(1, 3), "c": torch.zeros(1)}, "tensor 'c' is unknown to this drafter"),
    ],
)
def test_check_weights_names_the_first_difference(weights: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights({"a": torch.zeros(2), "b": torch.zeros(1, 3)}, weights)


def test_a_serving_copy_leaves_the_drafter_in_training() -> None:
    target = tiny_target()
    drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16)).float().train()
    served = drafter.serving_copy(torch.bfloat16)
    assert not served.training and all(p.dtype == torch.bfloat16 and not p.requires_grad for p in served.parameters())
    assert drafter.training and all(p.dtype == torch.float32 for p in drafter.parameters())
    assert any(p.requires_grad for p in drafter.parameters())
    assert {p.data_ptr() for p in served.parameters()}.isdisjoint(p.data_ptr() for p in drafter.parameters())


class Derived(Eagle3Drafter):
    """A third party's, whose start goes through another's."""

    @classmethod
    def from_target(cls, parts, *, draft_vocab, feature_layers=None, width: int = 2):
        return super().from_target(parts, draft_vocab=draft_vocab, feature_layers=feature_layers)


def test_a_drafter_states_the_target_that_it_was_started_for() -> None:
    parts = TargetParts.of(tiny_target())
    for kind in (Derived, *map(get_drafter, ("dflash", "eagle", "eagle3", "medusa"))):
        started = kind.from_target(parts, draft_vocab=torch.arange(16))
        assert type(started) is kind and started.trained_for == parts.fingerprint
    for kind in map(get_drafter, ("ngram", "standalone")):  # which serve other targets
        assert kind.from_target(parts, draft_vocab=torch.arange(16)).trained_for is None
    Derived.check_options({"width": 3})
    with pytest.raises(ValueError, match="Derived has no setting 'widht'; did you mean 'width'"):
        Derived.check_options({"widht": 3})


class Positional(Eagle3Drafter):
    """A third party's, whose arguments need no names."""

    @classmethod
    def from_target(cls, parts, draft_vocab, feature_layers=None):
        return super().from_target(parts, draft_vocab=draft_vocab, feature_layers=feature_layers)


def test_the_page_of_checkpoints_has_each_entry_of_our_own_format(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "checkpoints.md").read_text()
    table = page.partition("in the format `aurora_rl`:\n")[2].partition("\n\n`model.safetensors`")[0]
    parts = TargetParts.of(tiny_target())
    drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.tensor([1, 4, 6]))
    drafter.save_pretrained(tmp_path, format="aurora_rl")
    written = json.loads((tmp_path / "config.json").read_text())
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(written)
    assert load_file(tmp_path / "model.safetensors")["d2t"].tolist() == [1, 3, 4]


def test_arguments_of_from_target_may_have_no_names() -> None:
    parts = TargetParts.of(tiny_target())
    started = Positional.from_target(parts, torch.arange(16), (1,))
    assert started.feature_layers == (1,) and started.trained_for == parts.fingerprint

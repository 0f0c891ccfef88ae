"""Handshake: validated on arrival, and one sentence for a mismatch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from aurora_rl.collectors.codec import CodecError
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.models.target_head import decoder_layers
from aurora_rl.policies import Eagle3Drafter, MedusaDrafter, TargetParts
from aurora_rl.policies.adapters import add_adapters
from aurora_rl.testing import tiny_target

HANDSHAKE = Handshake(1, "config", "head", (2, 5), "map", "eagle3")


def test_round_trip_through_json() -> None:
    assert Handshake.from_meta(json.loads(json.dumps(HANDSHAKE.to_meta()))) == HANDSHAKE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"schema": 2}, "schema is 1 at the learner and 2 at the engine"),
        ({"target": "other", "drafter": "medusa"}, "target is 'config' at the learner and 'other' at the engine"),
        ({"head_checksum": "x"}, "head_checksum is 'head'"),
        ({"feature_layers": (2, 6)}, r"feature_layers is \(2, 5\) at the learner and \(2, 6\) at the engine"),
        ({"draft_map_checksum": ""}, "draft_map_checksum is 'map' at the learner and '' at the engine"),
        ({"drafter": "medusa"}, "drafter is 'eagle3'"),
        ({"schema": 2}, "; run the same version of aurora-rl on both sides"),
        ({"target": "other"}, "; set the same model on both sides"),
        ({"head_checksum": "x"}, "; set the same model and dtype on both sides"),
        ({"feature_layers": (2, 6)}, "; start both from one drafter: give server and learner the same drafter.path"),
        (
            {"draft_map_checksum": ""},
            "; their draft vocabularies differ; start both from one drafter: .* drafter.path, or",
        ),
        ({"drafter": "medusa"}, "; set the same drafter.name on both sides"),
        (
            {"adapters": "a"},
            "adapters is '' at the learner and 'a' at the engine; set the same drafter.adapters, in one",
        ),
    ],
)
def test_mismatch_names_the_first_field_and_both_values(changes: dict, says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(HANDSHAKE.mismatch(replace(HANDSHAKE, **changes)))


def test_adapters_are_a_field_where_there_are_some() -> None:
    """A learner or an engine of an earlier release has none, and meets one that has none."""
    assert "adapters" not in HANDSHAKE.to_meta()
    adapted = replace(HANDSHAKE, adapters="digest")
    assert Handshake.from_meta(adapted.to_meta()) == adapted and adapted.identity != HANDSHAKE.identity

    def digest(*names: str, rank: int = 2) -> str:
        parts = TargetParts.of(tiny_target(dtype=torch.float32))
        drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(8))
        add_adapters(drafter, names, rank)
        return Handshake.of(parts, drafter, "eagle3").adapters

    assert digest("a", "b") == digest("a", "b")
    assert len({digest("a", "b"), digest("b", "a"), digest("a"), digest("a", "b", rank=3)}) == 4


def test_fine_tunes_with_one_head_are_told_apart_in_any_dtype() -> None:
    def handshake(change: float = 0.0, dtype: torch.dtype = torch.float32) -> Handshake:
        model = tiny_target(dtype=torch.float32)
        with torch.no_grad():
            decoder_layers(model)[-1].mlp.up_proj.weight.add_(change)
        parts = TargetParts.of(model.to(dtype))
        drafter = MedusaDrafter.from_target(parts, draft_vocab=torch.arange(8))
        return Handshake.of(parts, drafter, "medusa")

    first, tuned, again = handshake(), handshake(0.01), handshake()
    assert first == again and first.identity == again.identity
    assert first.head_checksum == tuned.head_checksum and first.identity != tuned.identity
    mismatch = str(first.mismatch(tuned))
    assert "target is " in mismatch and "set the same model on both sides" in mismatch
    # What differs for another dtype is the head alone, which the message then names.
    assert handshake(dtype=torch.bfloat16).target == first.target


def test_equal_handshakes_match() -> None:
    assert HANDSHAKE.mismatch(replace(HANDSHAKE)) is None


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        (None, "must be a JSON object, got a NoneType; use one release"),
        ({}, r"has the fields \[\], this side reads exactly schema, .*; use one release"),
        ({**HANDSHAKE.to_meta(), "extra": 1}, "has the fields .*'extra'.* this side reads exactly"),
        ({**HANDSHAKE.to_meta(), "schema": True}, "schema"),
        ({**HANDSHAKE.to_meta(), "target": 3}, "target"),
        ({**HANDSHAKE.to_meta(), "drafter": "x" * 257}, "drafter"),
        ({**HANDSHAKE.to_meta(), "feature_layers": [1.0]}, "feature_layers"),
        ({**HANDSHAKE.to_meta(), "feature_layers": "12"}, "feature_layers"),
        ({**HANDSHAKE.to_meta(), "feature_layers": [1] * 257}, "feature_layers"),
    ],
)
def test_from_meta_refuses(meta: object, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        Handshake.from_meta(meta)

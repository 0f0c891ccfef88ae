"""Drafters by name: those here, those of installed packages, and broken ones of these."""

from __future__ import annotations

import importlib
import json
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from aurora_rl import registry
from aurora_rl.policies import DRAFTERS, Drafter, Eagle3Drafter, NgramDrafter, TargetParts, get_drafter
from aurora_rl.policies.registry import names_drafter, recognized, register_drafter, start_untrained
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target

MODULE = "test_registry_module"


@pytest.mark.parametrize(
    ("text", "is_name"),
    [
        ("eagle3", True),  # also where a folder has the name
        ("eagel3", True),  # a misspelled name, which is told as one
        ("package.module:Thing", True),
        ("mine", False),
        ("odd:folder", False),
        ("owner/drafter", False),
        ("./eagle3", False),
        ("no/such:folder", False),
    ],
)
def test_names_are_told_from_folders_and_hub_ids(
    text: str, is_name: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("eagle3", "mine", "odd:folder"):
        (tmp_path / folder).mkdir()
    assert names_drafter(text) == is_name


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> type[NgramDrafter]:
    """Entry points of installed packages: one that works, whose class is returned, and broken ones."""

    class FastDrafter(NgramDrafter):
        pass

    def points(group: str) -> list[EntryPoint]:
        assert group == "aurora_rl.drafters"
        named = {
            "fastdraft": f"{MODULE}:FastDrafter",
            "a_counter": "collections:Counter",
            "a_ghost": "no_such_module:Ghost",
        }
        return [EntryPoint(name, value, group) for name, value in named.items()]

    module = ModuleType(MODULE)
    module.FastDrafter = FastDrafter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(registry, "entry_points", points)
    return FastDrafter


def test_drafters_of_installed_packages_are_found_by_name(installed: type[NgramDrafter]) -> None:
    assert {"fastdraft", "a_counter", "a_ghost", "eagle3"} <= set(DRAFTERS)
    assert get_drafter("fastdraft") is installed
    with pytest.raises(ValueError, match="did you mean 'fastdraft'"):
        get_drafter("fastdarft")
    with pytest.raises(ValueError, match="'a_counter' is collections:Counter, which is no subclass"):
        get_drafter("a_counter")
    with pytest.raises(ValueError, match="'a_ghost' cannot be imported: No module named 'no_such_module'"):
        get_drafter("a_ghost")


def test_a_class_without_a_name_is_known_where_it_is_imported_and_never_imported_by_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("written_here", "written_there"):
        source = "from aurora_rl.policies import MedusaDrafter\nclass Mine(MedusaDrafter):\n    pass\n"
        (tmp_path / f"{module}.py").write_text(source)
    parts = TargetParts.of(tiny_target())
    kind = get_drafter("written_here:Mine")
    kind.from_target(parts, draft_vocab=torch.arange(16)).save_pretrained(tmp_path / "mine")
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["architectures"] == ["Mine"] and config["aurora_rl_drafter"] == "written_here:Mine"
    assert type(Drafter.from_pretrained(tmp_path / "mine", parts)) is kind

    config["aurora_rl_drafter"] = "written_there:Mine"
    (tmp_path / "mine" / "config.json").write_text(json.dumps(config))
    message = (
        "the drafter is of the class written_there:Mine, which is not imported, .*; set drafter.name=written_there:Mine"
        r", or in Python import written_there first, or give Mine.from_pretrained\(folder, target\) as the drafter"
    )
    with pytest.raises(CheckpointError, match=message):
        Drafter.from_pretrained(tmp_path / "mine", parts)
    assert "written_there" not in sys.modules
    there = get_drafter("written_there:Mine")
    assert type(Drafter.from_pretrained(tmp_path / "mine", parts)) is there
    assert type(kind.from_pretrained(tmp_path / "mine", parts)) is kind

    again = importlib.reload(sys.modules["written_there"]).Mine  # as a cell of a notebook that runs again
    assert again is not there and type(Drafter.from_pretrained(tmp_path / "mine", parts)) is again


def test_a_name_belongs_to_one_class() -> None:
    class EagleDrafter(NgramDrafter):
        pass

    EagleDrafter.__qualname__ = "EagleDrafter"  # as one at the top of a user's module
    with pytest.raises(ValueError, match="the drafter name 'eagle' belongs to aurora_rl.policies.eagle:EagleDrafter"):
        register_drafter("eagle")(EagleDrafter)
    kept = get_drafter("eagle")
    assert register_drafter("eagle")(kept) is kept


@pytest.mark.parametrize("name", ["mine:", ":Mine", "mine"])
def test_names_that_lead_nowhere_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"no drafter is called '{name}'; there are "):
        get_drafter(name)


def test_a_broken_entry_point_keeps_no_other_drafter_from_being_read(
    installed: type[NgramDrafter], caplog: pytest.LogCaptureFixture
) -> None:
    assert recognized({"architectures": ["LlamaForCausalLMEagle3"]}) is Eagle3Drafter
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and "'a_counter' is" in warned[0] and "'a_ghost' cannot be imported" in warned[1]
    with pytest.raises(ValueError, match=r"no drafter is of architectures \['Unheard'\]"):
        recognized({"architectures": ["Unheard"]})


def test_an_untrained_drafter_knows_its_target_and_its_vocabulary() -> None:
    parts = TargetParts.of(tiny_target())
    prior = torch.arange(len(parts.head)).float()
    drafter = start_untrained(Eagle3Drafter, parts, prior, vocab_size=3, feature_layers=(1,))
    assert drafter.trained_for == parts.fingerprint and drafter.feature_layers == (1,)
    assert drafter.draft_vocab.tolist() == [len(parts.head) - 3, len(parts.head) - 2, len(parts.head) - 1]
    assert len(start_untrained(Eagle3Drafter, parts).draft_vocab) == len(parts.head)  # at most the default

    class Returnless(Eagle3Drafter):
        @classmethod
        def from_target(cls, parts, **options):
            return None

    with pytest.raises(ValueError, match="^from_target gave None and no drafter"):
        start_untrained(Returnless, parts)


def started_by_eagle3(parts: TargetParts, **options: Any) -> Eagle3Drafter:
    started = Eagle3Drafter.from_target(parts, **options)
    started.trained_for = None
    return started


class Static(Eagle3Drafter):
    from_target = staticmethod(started_by_eagle3)


class Starts:
    @classmethod
    def from_target(cls, parts, **options):
        return started_by_eagle3(parts, **options)


class Mixed(Starts, Eagle3Drafter):
    pass


class Later(Eagle3Drafter):
    pass


Later.from_target = staticmethod(started_by_eagle3)


@pytest.mark.parametrize("kind", [Static, Mixed, Later])
def test_an_untrained_drafter_knows_its_target_wherever_its_start_is_defined(kind: type[Eagle3Drafter]) -> None:
    parts = TargetParts.of(tiny_target())
    assert start_untrained(kind, parts).trained_for == parts.fingerprint


def test_a_drafter_without_weights_is_of_no_target() -> None:
    assert start_untrained(NgramDrafter, TargetParts.of(tiny_target())).trained_for is None

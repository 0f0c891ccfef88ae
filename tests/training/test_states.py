"""Training states on disk: whole or not there, the newest of them kept, and what became of their bytes is noticed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.training.states import StateError, add_state, check_state, newest_valid, states


def writes(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "drafter").mkdir(parents=True)
        (folder / "progress.json").write_text(text)
        (folder / "drafter" / "config.json").write_text(text)

    return write


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for text in ("one", "two"):
        add_state(tmp_path / "learner", writes(text), keep=3)
    return tmp_path / "learner"


class Killed(BaseException):
    """As SIGKILL, after which nothing of ours runs."""


@pytest.mark.parametrize("at", ["written", "sealed"])
def test_a_call_that_is_killed_leaves_the_states_as_they_were(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    def killed(*args: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("aurora_rl.training.states.shutil.rmtree", lambda *args, **kwargs: None)
        patch.setattr(f"aurora_rl.training.states.{'_seal' if at == 'written' else 'os.replace'}", killed)
        add_state(folder, writes("three"), keep=3)
    assert (folder / ".part" / "progress.json").read_text() == "three"  # no part of it is taken for a state
    assert [state.name for state in states(folder)] == ["000002", "000001"]
    add_state(folder, writes("four"), keep=3)
    newest, refused = newest_valid(folder)
    assert newest is not None and (newest / "progress.json").read_text() == "four" and refused == []
    assert not (folder / ".part").exists()


def test_what_cannot_be_written_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    def full(state: Path) -> None:
        writes("three")(state)
        raise OSError("the disk is full")

    for place in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="the disk is full"):
            add_state(place, full, keep=1)
    assert [path.name for path in sorted(folder.iterdir())] == ["000001", "000002"]
    assert not (tmp_path / "new").exists()


def test_the_newest_are_kept_by_number_and_not_by_name(folder: Path) -> None:
    (folder / "000002").rename(folder / "999999")
    assert add_state(folder, writes("three"), keep=2).name == "1000000"
    assert [state.name for state in states(folder)] == ["1000000", "999999"]


@pytest.mark.parametrize("name", ["progress.json", "drafter/config.json", "manifest.json"])
def test_each_changed_or_missing_file_is_found_and_the_state_before_taken(folder: Path, name: str) -> None:
    newest, older = states(folder)
    for change in ("flip", "cut", "remove"):
        file = newest / name
        content = file.read_bytes()
        for place in range(len(content)) if change == "flip" else [len(content) // 2]:
            if change == "flip":
                file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            elif change == "cut":
                file.write_bytes(content[:place])
            else:
                file.unlink()
            found, (reason,) = newest_valid(folder)
            assert found == older and reason.startswith(f"{newest}")
        file.write_bytes(content)
    check_state(newest)


def test_a_state_without_a_manifest_is_one_of_a_training_or_of_an_earlier_release(tmp_path: Path, folder: Path) -> None:
    writes("of train")(tmp_path / "flat")
    assert newest_valid(tmp_path / "flat") == (tmp_path / "flat", [])
    (states(folder)[0] / "manifest.json").unlink()
    found, (reason,) = newest_valid(folder)
    assert found is not None and found.name == "000001" and "manifest.json cannot be read" in reason
    assert newest_valid(tmp_path / "nothing") == (None, [])


def sealed_anew(state: Path, **changes: Any) -> None:
    """Write the manifest that another release would have written."""
    manifest = {**json.loads((state / "manifest.json").read_text()), **changes}
    del manifest["checksum"]
    digest = hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()
    (state / "manifest.json").write_text(json.dumps({**manifest, "checksum": digest}))


def test_of_newer_releases_minor_ones_are_read_and_major_ones_refused_by_name(folder: Path) -> None:
    newest = states(folder)[0]
    sealed_anew(newest, format="1.7", compression="none")
    check_state(newest)
    sealed_anew(newest, format="2.0")
    with pytest.raises(StateError, match=r"000002 has the format 2.0, this release reads 1.0 and older ones; use the"):
        check_state(newest)


def test_a_state_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda file: (done.append(Path(os.readlink(f"/proc/self/fd/{file}")).name), fsync(file))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("named"), replace(*paths)))
    add_state(tmp_path / "learner", writes("one"), keep=1)
    assert sorted(done[:-1]) == ["config.json", "manifest.json", "progress.json"] and done[-1] == "named"

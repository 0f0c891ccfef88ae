"""Folders of tensors and documents: written whole or not at all."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from aurora_rl import storage
from aurora_rl.storage import CheckpointError, read_folder, save_tensors, write_file, write_folder

OLD, NEW = {"x": torch.zeros(2)}, {"x": torch.ones(3)}


def test_folders_hold_tensors_and_documents(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    write_folder(tmp_path / "deep" / "folder", tensors, {"one.json": {"k": [1, None]}, "two.json": {}})
    read, document = read_folder(tmp_path / "deep" / "folder", "one.json")
    assert document == {"k": [1, None]}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_file(path, "ä\n")
    write_file(path, lambda part: part.write_text("new", encoding="utf-8"))
    assert path.read_text() == "new"

    def full(part: Path) -> None:
        part.write_text("ha")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write_file(path, full)
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"] and path.read_text() == "new"


@pytest.mark.parametrize(
    ("write", "error"),
    [(save_tensors, OSError), (torch.save, RuntimeError)],
    ids=["safetensors", "torch.save"],
)
def test_a_file_of_tensors_on_a_full_disk_leaves_no_half(
    write: Callable[[dict[str, Tensor], Path], None], error: type[Exception], tmp_path: Path
) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(error):
            write_file(tmp_path / "x", lambda part: write({"x": torch.zeros(10_000)}, part))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_from_a_working_directory_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for tensors in (OLD, NEW):
        write_folder(tmp_path / "state", tensors, {"d.json": {}})
    assert torch.equal(read_folder(tmp_path / "state", "d.json")[0]["x"], NEW["x"])


class Killed(BaseException):
    """Stands for SIGKILL: nothing but the test catches it, and no cleaning up happens in the code under test."""


@pytest.mark.parametrize("at", ["tensors", "document", "first rename", "second rename", "clean-up"])
def test_a_save_that_is_killed_leaves_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    folder = tmp_path / "state"
    write_folder(folder, OLD, {"d.json": {"n": 0}})
    with monkeypatch.context() as patch:
        calls = {"replace": 0, "rmtree": 0}

        def replace(source: Path, target: Path, real=os.replace) -> None:
            calls["replace"] += 1
            if at == ("first rename", "second rename")[calls["replace"] - 1]:
                raise Killed
            real(source, target)

        def rmtree(path: Path, ignore_errors: bool, real=storage.shutil.rmtree) -> None:
            if at == "clean-up" and calls["replace"] == 2:
                raise Killed
            real(path, ignore_errors=ignore_errors)

        def fail(*args, **kwargs) -> None:
            raise Killed

        patch.setattr(os, "replace", replace)
        patch.setattr(storage.shutil, "rmtree", rmtree)
        if at == "tensors":
            patch.setattr(storage, "save_file", fail)
        elif at == "document":
            patch.setattr(json, "dumps", fail)
        with pytest.raises(Killed):
            write_folder(folder, NEW, {"d.json": {"n": 1}})

    tensors, document = read_folder(folder, "d.json")
    assert document["n"] == (1 if at == "clean-up" else 0)
    assert torch.equal(tensors["x"], (NEW if document["n"] else OLD)["x"])
    # The next save puts everything in order and leaves no litter.
    write_folder(folder, NEW, {"d.json": {"n": 2}})
    assert read_folder(folder, "d.json")[1] == {"n": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


@pytest.mark.parametrize("rename", [0, 1])
def test_a_folder_that_cannot_be_renamed_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rename: int
) -> None:
    folder, real, calls = tmp_path / "state", os.replace, itertools.count()
    write_folder(folder, OLD, {"d.json": {"n": 0}})

    def replace(source: Path, target: Path) -> None:
        if next(calls) == rename:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match=f"^{folder} cannot be written: .*Input/output error"):
        write_folder(folder, NEW, {"d.json": {"n": 1}})
    assert read_folder(folder, "d.json")[1] == {"n": 0} and [path.name for path in tmp_path.iterdir()] == ["state"]


def test_a_folder_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    write_folder(tmp_path / "state", OLD, {"progress.json": {"steps": 1}})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="state cannot be written: .*File too large"):
            write_folder(tmp_path / "state", {"x": torch.zeros(10_000)}, {"progress.json": {"steps": 2}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    assert read_folder(tmp_path / "state", "progress.json")[1] == {"steps": 1}


def test_a_folder_without_a_name_of_its_own_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "state", OLD, {"d.json": {"n": 0}})
    monkeypatch.chdir(tmp_path / "state")
    assert read_folder(".", "d.json")[1] == {"n": 0}
    monkeypatch.chdir(tmp_path)
    for folder in (".", "/"):
        with pytest.raises(CheckpointError, match=f"^{folder} is not a checkpoint: "):
            read_folder(folder, "d.json")


def test_the_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "state", OLD, {"d.json": {"n": 0}})
    monkeypatch.chdir(tmp_path / "state")
    for folder in (".", tmp_path / "state", "../state"):
        with pytest.raises(OSError, match="cannot be written: it is the working directory; name a folder in it"):
            write_folder(folder, NEW, {"d.json": {"n": 1}})
    assert sorted(os.listdir()) == ["d.json", "model.safetensors"]
    write_folder("in it", NEW, {"d.json": {"n": 1}})
    assert read_folder("in it", "d.json")[1] == {"n": 1} and "in it" in os.listdir()

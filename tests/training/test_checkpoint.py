from __future__ import annotations

import json
import os
import resource
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.report import EMPTY_SUMMARY, draw_report, write_summary
from aurora_rl.testing import serve, tiny_target
from aurora_rl.training import checkpoint as checkpoints
from aurora_rl.training.checkpoint import (
    CheckpointError,
    load_training_state,
    read_folder,
    save_training_state,
    write_folder,
)
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.trajectories import pack

OLD, NEW = {"x": torch.zeros(2)}, {"x": torch.ones(3)}


def fresh(dtype: torch.dtype, size: int = 20) -> tuple[Eagle3Drafter, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    parts = TargetParts.of(tiny_target())
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(size)).to(dtype)
    return drafter, drafter_optimizers(drafter, muon_lr=0.02, adam_lr=0.01)


@pytest.fixture(scope="module")
def batches() -> list[TensorDict]:
    drafter, _ = fresh(torch.float64)
    prompts = [torch.arange(2 + i) for i in range(4)]
    served = serve(drafter, tiny_target(), prompts, shape=TreeShape(2), max_new_tokens=6, num_slots=4)
    return [pack(served[i : i + 2]) for i in range(3)]


def train(
    drafter: Eagle3Drafter, optimizers: list[torch.optim.Optimizer], batches: list[TensorDict], steps: range
) -> None:
    head = TargetParts.of(tiny_target()).head.to(drafter.fc.weight.dtype)
    loss = ImitationLoss(drafter, head, steps=2)
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(batches[step % len(batches)])["loss_imitation"].backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_save_and_load_in_between_changes_no_bit(
    tmp_path: Path, batches: list[TensorDict], dtype: torch.dtype
) -> None:
    straight, optimizers = fresh(dtype)
    train(straight, optimizers, batches, range(8))

    first, optimizers = fresh(dtype)
    train(first, optimizers, batches, range(4))
    save_training_state(tmp_path / "state", first, optimizers, {"steps": 4})
    second, optimizers = fresh(dtype)
    assert load_training_state(tmp_path / "state", second, optimizers) == {"steps": 4}
    train(second, optimizers, batches, range(4, 8))

    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    # And it was worth saving: without the optimizers' state the second half differs.
    third, optimizers = fresh(dtype)
    third.load_state_dict(first.state_dict())
    train(third, optimizers, batches, range(4, 8))
    assert not torch.equal(third.fc.weight, second.fc.weight)


def test_folders_hold_tensors_and_documents(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6).view(2, 3).T, "b": torch.tensor(1.5, dtype=torch.bfloat16)}
    write_folder(tmp_path / "deep" / "folder", tensors, {"one.json": {"k": [1, None]}, "two.json": {}})
    read, document = read_folder(tmp_path / "deep" / "folder", "one.json")
    assert document == {"k": [1, None]}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)


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

        def rmtree(path: Path, ignore_errors: bool, real=checkpoints.shutil.rmtree) -> None:
            if at == "clean-up" and calls["replace"] == 2:
                raise Killed
            real(path, ignore_errors=ignore_errors)

        def fail(*args, **kwargs) -> None:
            raise Killed

        patch.setattr(os, "replace", replace)
        patch.setattr(checkpoints.shutil, "rmtree", rmtree)
        if at == "tensors":
            patch.setattr(checkpoints, "save_file", fail)
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


def test_wrong_checkpoints_name_the_first_tensor(tmp_path: Path) -> None:
    drafter, optimizers = fresh(torch.float32)
    other, others = fresh(torch.float32, size=10)
    save_training_state(tmp_path / "other", other, others, {})
    with pytest.raises(
        CheckpointError, match=r"other: tensor 'lm_head.weight' is \(10, 16\), this drafter needs \(20, 16\)"
    ):
        load_training_state(tmp_path / "other", drafter, optimizers)

    tensors = {f"module.{name}": value for name, value in drafter.state_dict().items()}
    write_folder(tmp_path / "more", {**tensors, "module.extra": torch.zeros(1)}, {"progress.json": {}})
    with pytest.raises(CheckpointError, match="more: tensor 'extra' is unknown to this drafter"):
        load_training_state(tmp_path / "more", drafter, optimizers)
    del tensors["module.norm.weight"]
    write_folder(tmp_path / "less", tensors, {"progress.json": {}})
    with pytest.raises(CheckpointError, match="less: tensor 'norm.weight' is missing, this drafter needs"):
        load_training_state(tmp_path / "less", drafter, optimizers)


@pytest.mark.parametrize("broken", ["missing", "tensors", "document"])
def test_broken_folders_say_so(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "state"
    if broken != "missing":
        write_folder(folder, OLD, {"progress.json": {}})
        file = folder / {"tensors": "model.safetensors", "document": "progress.json"}[broken]
        file.write_bytes(b"\xff{not what it was")
    drafter, optimizers = fresh(torch.float32)
    with pytest.raises(
        CheckpointError, match="state is not a checkpoint: .*; give a folder with model.safetensors and progress.json"
    ):
        load_training_state(folder, drafter, optimizers)


def test_paths_may_be_strings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    drafter, optimizers = fresh(torch.float32)
    save_training_state("state", drafter, optimizers, {"steps": 4})
    assert load_training_state("state", drafter, optimizers) == {"steps": 4}
    write_folder("folder", NEW, {"config.json": {"a": 1}})
    tensors, config = read_folder("folder", "config.json")
    assert torch.equal(tensors["x"], NEW["x"]) and config == {"a": 1}
    MetricsLog("run/metrics.jsonl", "server").write("swap")
    assert [event["event"] for event in MetricsReader("run/metrics.jsonl").new()] == ["swap"]
    write_summary("run", EMPTY_SUMMARY)
    draw_report("run/report.png", [], [], [])
    assert {path.name for path in Path("run").iterdir()} == {"metrics.jsonl", "summary.json", "report.png"}


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

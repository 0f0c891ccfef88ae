from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensordict import TensorDict

from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.storage import CheckpointError, read_folder, write_folder
from aurora_rl.telemetry.history import RunHistory
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.report import draw_report, write_summary
from aurora_rl.telemetry.stats import Stats
from aurora_rl.testing import serve, tiny_target
from aurora_rl.training.checkpoint import load_training_state, save_training_state
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


def test_wrong_checkpoints_name_the_first_tensor(tmp_path: Path) -> None:
    drafter, optimizers = fresh(torch.float32)
    small, small_optimizers = fresh(torch.float32, size=10)
    save_training_state(tmp_path / "other", small, small_optimizers, {})
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
    assert [event["event"] for event in MetricsReader("run/metrics.jsonl")] == ["swap"]
    write_summary("run", Stats().summary())
    draw_report("run/report.png", RunHistory())
    assert {path.name for path in Path("run").iterdir()} == {"metrics.jsonl", "summary.json", "report.png"}


def test_two_flipped_bytes_are_found(tmp_path: Path) -> None:
    drafter, optimizers = fresh(torch.float32)
    save_training_state(tmp_path / "state", drafter, optimizers, {"steps": 4})
    file = tmp_path / "state" / "model.safetensors"
    content = bytearray(file.read_bytes())
    for place in (-1, -100):
        content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="state: the tensors are not those that were written; take an older"):
        load_training_state(tmp_path / "state", drafter, optimizers)


def test_a_state_that_is_not_finite_is_refused_and_one_without_a_checksum_is_not(tmp_path: Path) -> None:
    drafter, optimizers = fresh(torch.float32)
    tensors = {f"module.{name}": value.clone() for name, value in drafter.state_dict().items()}
    write_folder(tmp_path / "earlier", tensors, {"progress.json": {"steps": 4}})
    assert load_training_state(tmp_path / "earlier", drafter, optimizers) == {"steps": 4}
    tensors["module.fc.weight"][0, 0] = torch.nan
    write_folder(tmp_path / "bad", tensors, {"progress.json": {}})
    with pytest.raises(CheckpointError, match="bad: tensor 'module.fc.weight' has 1 value that is infinite or not a"):
        load_training_state(tmp_path / "bad", drafter, optimizers)

"""`aurora-rl train --resume`: after an interruption, with more epochs, and refused."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from run_events import summary
from safetensors.torch import load_file
from trainings import chats, interrupt, train, training_pairs

from aurora_rl.cli import main as cli
from aurora_rl.cli.config import load_config
from aurora_rl.cli.run_dir import RunDir
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import TransformersEngine
from aurora_rl.training.offline import OfflineTrainer


@pytest.fixture
def pairs(tiny_folder: Path) -> list[str]:
    return training_pairs(tiny_folder)


def test_a_training_that_was_interrupted_ends_as_one_that_was_not(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [*pairs, "engine.slots=1"]  # requests are recorded in their order
    whole, parts = tmp_path / "whole", tmp_path / "its parts"
    assert train("--epochs", "2", *pairs, f"run_dir={whole}") == 0
    for owner, method, call in ((TrajectoryDataset, "append", 3), (OfflineTrainer, "step", 3)):
        with monkeypatch.context() as patch:
            interrupt(patch, owner, method, call)
            words = ["--resume", str(parts)] if parts.exists() else ["--epochs", "2", *pairs, f"run_dir={parts}"]
            assert train(*words) == 130
        out = capsys.readouterr().out
        assert f"interrupted; aurora-rl train --resume '{parts}' goes on" in out
        assert not (parts / "summary.json").exists()
    progress = parts / "learner" / "progress.json"
    assert (so_far := json.loads(progress.read_text()))["batches"] == 3
    progress.write_text(json.dumps(so_far | {"seconds": so_far["seconds"] + 1000}))
    assert train("--resume", str(parts)) == 0
    assert 1000 < summary(parts)["duration_s"] < 2000
    recorded = [int(trajectory["request"]) for trajectory in TrajectoryDataset(parts / "recording")]
    assert recorded == list(range(6))
    states = [load_file(run / "learner" / "model.safetensors") for run in (whole, parts)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    duration = {"duration_s": 0.0}
    assert summary(parts) | duration == summary(whole) | duration
    # More epochs go on from there, also if they are interrupted.
    with monkeypatch.context() as patch:
        interrupt(patch, OfflineTrainer, "step", 1)
        assert train("--epochs", "3", "--resume", str(parts)) == 130
    assert train("--resume", str(parts)) == 0
    assert summary(parts)["steps"] == 6
    with contextlib.closing(RunDir(load_config(overrides=[f"run_dir={parts}"]), resume=True)):  # still goes on
        assert train("--epochs", "4", "--resume", str(parts)) == 2
    assert f"aurora-rl: --resume {parts}: the run in this folder still goes on" in capsys.readouterr().err
    assert summary(parts)["steps"] == 6
    assert train("--epochs", "2", "--resume", str(parts)) == 2
    assert "--epochs 2: more than 2 epochs are learned already; give 3 or more" in capsys.readouterr().err
    assert train("--resume", str(parts), "--recording", str(whole / "recording")) == 2
    assert "it was started without --recording, which stays" in capsys.readouterr().err
    assert json.loads((parts / "train.json").read_text())["epochs"] == 3
    with monkeypatch.context() as patch:  # while it loads

        def stopped(spec: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("aurora_rl.cli.train.load", stopped)
        assert train("--epochs", "5", "--resume", str(parts)) == 130
    assert json.loads((parts / "train.json").read_text())["epochs"] == 5
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"first": {"all": 1.2}}))
    assert train("--epochs", "4", "--resume", str(parts)) == 2
    assert f"--resume {parts}: an earlier release began it" in capsys.readouterr().err
    assert json.loads((parts / "train.json").read_text())["epochs"] == 5


def test_one_that_is_stopped_before_it_loads_can_be_resumed(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("aurora_rl.cli.train.logged", stopped)
    assert train("--epochs", "2", *pairs, f"run_dir={tmp_path / 'run'}") == 130
    assert train("--resume", str(tmp_path / "run")) == 130


def test_a_file_next_to_resume_changes_what_it_names_alone(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chats(tmp_path / "chats.jsonl", *([("user", f"question {number}")] for number in range(6)))
    mine, run = tmp_path / "mine.yaml", tmp_path / "run"
    words = [*pairs, f"traffic.path={tmp_path / 'chats.jsonl'}", "learner.batch_size=2", f"run_dir={run}"]
    assert train("--epochs", "1", *words) == 0
    mine.write_text("engine.threads: 1\n")
    assert train("--epochs", "2", "--resume", str(run), "--config", str(mine)) == 0
    mine.write_text("seed: 7\n")
    capsys.readouterr()
    assert train("--epochs", "3", "--resume", str(run), "--config", str(mine)) == 2
    assert "and this command has seed=7; leave the key out" in capsys.readouterr().err


class OtherEngine(TransformersEngine):
    """An engine of a third party."""


OTHERS = ["seed=1", "drafter.depth=3", "traffic.requests=9", "learner.muon_lr=0.5", "rule=greedy"]


@pytest.mark.parametrize("pair", [*OTHERS, f"engine.name={__name__}:OtherEngine"])
def test_other_settings_are_not_resumed(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert cli.main(["train", "--print-config", *pairs]) == 0
    (run / "config.yaml").write_text(capsys.readouterr().out)
    (run / "train.json").write_text('{"recording": null, "epochs": 1, "held_out": 0.1}')
    assert train("--resume", str(run), pair) == 2
    key, _, value = pair.partition("=")
    assert f"and this command has {key}={value}; leave the key out" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["reordered", "another"])
def test_other_chats_are_not_resumed(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    run, elsewhere, first, second = tmp_path / "run", tmp_path / "elsewhere", [("user", "one")], [("user", "two")]
    elsewhere.mkdir()
    chats(elsewhere / "chats.jsonl", first, first)  # a relative path is of the folder that the training started in
    chats(tmp_path / "chats.jsonl", first, second)
    monkeypatch.chdir(tmp_path)
    words = [*pairs, "traffic.path=chats.jsonl", "learner.batch_size=1", "run_dir=run", "engine.slots=1"]
    assert train("--epochs", "1", *words) == 0
    monkeypatch.chdir(elsewhere)
    assert train("--epochs", "2", "--resume", str(run)) == 0
    assert summary(run)["steps"] == 2
    chats(tmp_path / "chats.jsonl", *((second, first) if change == "reordered" else (first, [("user", "three")])))
    capsys.readouterr()
    assert train("--epochs", "3", "--resume", str(run)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"(traffic.path={tmp_path / 'chats.jsonl'}) was changed or reordered since it was started" in line

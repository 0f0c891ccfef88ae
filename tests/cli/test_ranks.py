"""Processes of a learner: what torchrun started and the configuration go together, or a line says what to set."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.distributed.fsdp

from aurora_rl.cli import main as cli
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.ranks import Place, own_device, place_of

STARTED = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
BY_TORCHRUN = {**STARTED, "TORCHELASTIC_RUN_ID": "none"}


def config(*pairs: str) -> Config:
    return load_config(overrides=pairs)


def test_a_process_has_its_place_by_the_environment() -> None:
    assert place_of(config("learner.parallel=ddp"), BY_TORCHRUN) == Place(1, 3, 1)
    assert place_of(config(), {}) is None
    assert place_of(config(), {**BY_TORCHRUN, "WORLD_SIZE": "1"}) is None
    assert place_of(config(), STARTED) is None  # clusters set these for other programs


@pytest.mark.parametrize(
    ("pairs", "environment", "message"),
    [
        (
            [],
            BY_TORCHRUN,
            "torchrun started 3 processes, and learner.parallel=null is for one; set learner.",
        ),
        (["learner.parallel=ddp"], {}, "RANK is not in the environment; start them by `torchrun --nproc-per-node 2 -m"),
        (
            ["learner.parallel=ddp", "learner.batch_size=2"],
            STARTED,
            "3 processes are more than the learner.batch",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(pairs: list[str], environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        place_of(config(*pairs), environment)


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="learner.parallel must be ddp, fsdp or null, got 'tp'"):
        config("learner.parallel=tp")


def test_a_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(3, 4, 1)
    assert own_device(config("device=cpu"), place) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(config(), place) == own_device(config("device=cuda"), place) == "cuda:1"
    with pytest.raises(ConfigError, match="process 2 of this host has no GPU, there are 2; start torchrun with"):
        own_device(config(), Place(2, 4, 2))
    for device in ("mps", "cuda:0"):
        with pytest.raises(ConfigError, match=f"needs device=cpu, cuda or auto, got '{device}'"):
            own_device(config(f"device={device}"), place)


def test_a_build_without_gloo_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(ConfigError, match="needs a build of PyTorch with torch.distributed and gloo"):
        own_device(config("device=cpu"), Place(0, 1, 0))


def test_a_pytorch_that_cannot_shard_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.distributed.fsdp.FSDPModule, "set_reduce_scatter_unused_params")
    assert own_device(config("device=cpu", "learner.parallel=ddp"), Place(0, 1, 0)) == "cpu"
    with pytest.raises(ConfigError, match="fsdp needs PyTorch 2.13, this is .*; set learner.parallel=ddp"):
        own_device(config("device=cpu", "learner.parallel=fsdp"), Place(0, 1, 0))


@pytest.mark.parametrize("command", ["serve", "flywheel", "train"])
def test_commands_that_learn_in_one_process_refuse_it(
    arguments: list[str], command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([command, *arguments, "learner.parallel=ddp"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aurora-rl: learner.parallel=ddp is of aurora-rl learn, and ")


def test_learn_without_torchrun_is_refused_before_anything_is_made(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["learn", *arguments, "learner.parallel=ddp"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "start them by `torchrun --nproc-per-node 2 -m aurora_rl.cli.main learn learner.parallel=ddp`" in line
    assert not (tmp_path / "run").exists()

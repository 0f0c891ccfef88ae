"""The figures of both halves of a run reach TorchRL's loggers, and a logger that fails ends nothing."""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchrl.record.loggers import CSVLogger

from aurora_rl.telemetry import loggers
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.loggers import EventLogger, check_installed, figures, logged

GATE: dict[str, Any] = {
    "publish": True, "difference": 0.25, "interval": [0.5, -1], "reason": None, "requests": 16, "version": 2,
    "steps": 9,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def write(run_dir: Path) -> Callable[..., None]:
    """Writes an event as the server does, or, with steps, as the learner does."""
    logs = {source: MetricsLog(run_dir / "metrics.jsonl", source) for source in ("server", "learner")}
    return lambda event, **fields: logs["learner" if "steps" in fields else "server"].write(event, **fields)


def csv(run_dir: Path) -> dict[str, list[tuple[float, ...]]]:
    """The lines of each file of the CSV logger, by its name: step and value."""
    folder = run_dir / "logs" / run_dir.name / "scalars"
    return {
        str(path.relative_to(folder).with_suffix("")): [
            tuple(map(float, line.split(","))) for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.rglob("*.csv"))
    }


def test_numbers_have_the_names_of_their_fields_and_the_step_of_their_event() -> None:
    status = {
        "event": "status", "time": 5.5, "source": "server", "requests": 40, "version": 3, "coverage": None,
        "acceptance_by_position": [0.5, 0.25], "tokens_per_second": {"baseline": None, "speculative": 9.5},
        "learner": "running",
    }  # fmt: skip
    assert figures(status) == (40, {
        "status/version": 3.0, "status/acceptance_by_position/1": 0.5, "status/acceptance_by_position/2": 0.25,
        "status/tokens_per_second/speculative": 9.5,
    })  # fmt: skip
    assert figures({"event": "gate", **GATE}) == (9, {
        "gate/publish": 1.0, "gate/difference": 0.25, "gate/interval/1": 0.5, "gate/interval/2": -1.0,
        "gate/requests": 16.0, "gate/version": 2.0,
    })  # fmt: skip
    waits = {"time_to_first_token": 0.25, "e2e_request_latency": 2.5}
    clients = {"running": 2, "waiting": 1, "waits": waits, "staleness": 1, "dropped": {"malformed": 3}}
    assert figures({"event": "status", "requests": 7, **clients}) == (7, {
        "status/running": 2.0, "status/waiting": 1.0, "status/waits/time_to_first_token": 0.25,
        "status/waits/e2e_request_latency": 2.5, "status/staleness": 1.0, "status/dropped/malformed": 3.0,
    })  # fmt: skip
    assert figures({"event": "train", "loss": 2, "objectives": {"a:b": 1}, "steps": 3, "batches": 4})[0] == 3
    assert figures({"event": "train", "loss": 2, "objectives": {"my_file:plain": 1}, "batches": 4}) == (
        4, {"train/loss": 2.0, "train/objectives/my_file_plain": 1.0},
    )  # fmt: skip


def test_both_halves_of_a_run_are_logged_as_csv(run_dir: Path, write: Callable[..., None]) -> None:
    write("swap", version=1, ms=9.0, requests=1)  # of an earlier part of the run
    with logged("csv", run_dir):
        write("status", requests=4, acceptance_length=1.5, depth=4)
        write("train", loss=3.0, steps=1)
        write("gate", **GATE)
        write("swap", version=2, ms=1.5, requests=5)
        write("request", request=4, tokens=7)
        write("train", loss=2.0, steps=2)
        write("drops", reasons={"malformed": 2}, steps=2)
        write("evaluation", batches=0, acceptance_length=2.5, domains={"../../up": 2.25})
    found = csv(run_dir)
    assert found["status/acceptance_length"] == [(4, 1.5)] and found["status/depth"] == [(4, 4)]
    assert found["train/loss"] == [(1, 3), (2, 2)]
    assert found["gate/difference"] == [(9, 0.25)] and found["gate/publish"] == [(9, 1)]
    assert found["drops/reasons/malformed"] == [(2, 2)]
    assert found["swap/version"] == [(5, 2)] and found["swap/ms"] == [(5, 1.5)]
    assert found["evaluation/domains/_up"] == [(0, 2.25)]
    assert not any(name.startswith("request") for name in found)


def test_figures_are_there_while_the_run_goes_on(
    run_dir: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loggers, "_TURN_S", 0.02)
    with logged("csv", run_dir):
        for step in (1, 2):
            write("train", loss=3.0, steps=step)
            end = time.monotonic() + 10
            while len(csv(run_dir).get("train/loss", [])) < step:
                assert time.monotonic() < end
                time.sleep(0.01)


def test_tensorboard_reads_what_is_logged(run_dir: Path, write: Callable[..., None]) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with logged("tensorboard", run_dir):
        write("status", requests=4, acceptance_length=1.5)
        write("train", loss=2.0, steps=2)
    read = accumulator.EventAccumulator(str(run_dir / "logs" / run_dir.name))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("status/acceptance_length")] == [(4, 1.5)]
    assert [(each.step, each.value) for each in read.Scalars("train/loss")] == [(2, 2.0)]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_service_takes_what_is_logged_without_a_network(
    run_dir: Path,
    write: Callable[..., None],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    with logged(name, run_dir):
        write("train", loss=2.0, steps=2)
        write("status", requests=1, acceptance_length=1.5)
    assert any((run_dir / "logs").iterdir()) and not caplog.records


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"^telemetry.logger={name} needs the package {name}: pip install {name}$"):
        check_installed(name)
    check_installed("csv")
    check_installed(None)


def test_without_a_logger_nothing_is_written(run_dir: Path, write: Callable[..., None]) -> None:
    with logged(None, run_dir):
        write("train", loss=3.0, steps=1)
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_a_logger_that_does_not_start_is_named(run_dir: Path, write: Callable[..., None]) -> None:
    (run_dir / "logs").write_text("in the way")
    with pytest.raises(ValueError, match=r"^telemetry.logger=csv does not start: .*logs"):
        EventLogger("csv", run_dir)


def test_a_logger_that_fails_is_told_once_and_goes_on(
    run_dir: Path, write: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    in_the_way = run_dir / "logs" / run_dir.name / "scalars" / "swap"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    with logged("csv", run_dir):
        for requests in range(3):
            write("swap", version=2, ms=1.5, requests=requests)
            write("train", loss=3.0, steps=requests + 1)
    (record,) = caplog.records
    assert record.message.startswith("telemetry.logger=csv lost figures, and the run goes on: ")
    assert csv(run_dir)["train/loss"] == [(1, 3), (2, 3), (3, 3)]


def test_a_logger_that_hangs_does_not_keep_the_run_from_its_end(
    run_dir: Path, write: Callable[..., None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answered = threading.Event()
    monkeypatch.setattr(CSVLogger, "log_metrics", lambda *arguments: answered.wait(10))
    monkeypatch.setattr(loggers, "_END_S", 0.1)
    began = time.monotonic()
    with logged("csv", run_dir):
        write("train", loss=3.0, steps=1)
    assert time.monotonic() - began < 5
    assert "telemetry.logger=csv did not end in 0 s; what it holds is lost" in caplog.text
    answered.set()

"""The configuration of a short run on the tiny model, and signal handlers put back after each test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from loopback_ports import free_addresses

from aurora_rl.cli.config import Config, load_config


@pytest.fixture
def arguments(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """Arguments of a short run on the tiny model, on ports of its own, in `tmp_path / "run"`."""
    trajectories, weights = free_addresses()
    return [
        *(f"model={tiny_folder}", "device=cpu", "dtype=float32", "drafter.vocab_size=64", "engine.slots=2"),
        *("engine.max_length=256", "engine.threads=1", "learner.threads=1", "learner.nice=0"),
        *("max_new_tokens=8", "traffic.requests=6", "http.port=null", f"run_dir={tmp_path / 'run'}"),
        *(f"wire.trajectories={trajectories}", f"wire.weights={weights}"),
    ]


@pytest.fixture(scope="module")
def ports() -> list[str]:
    return free_addresses()


@pytest.fixture(autouse=True)
def _signal_handlers(signal_handlers: None) -> None:
    """Every test here may run a command."""


@pytest.fixture
def configured(tiny_folder: Path, ports: list[str]) -> Callable[..., Config]:
    """Return the configuration of a short run on the tiny model, with further `key=value` pairs."""
    pairs = [
        *(f"model={tiny_folder}", "device=cpu", "dtype=float32", "drafter.vocab_size=64", "engine.slots=2"),
        *("engine.max_length=256", "max_new_tokens=8", "traffic.requests=5"),
        *(f"wire.trajectories={ports[0]}", f"wire.weights={ports[1]}"),
    ]
    return lambda *more: load_config(overrides=[*pairs, *more])


@pytest.fixture
def config(configured: Callable[..., Config]) -> Config:
    return configured()

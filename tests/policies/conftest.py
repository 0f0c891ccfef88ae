"""A drafter, and the folder of the run that trained it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.testing import tiny_target

RUN = {
    "requests": 300,
    "swaps": 31,
    "acceptance_length": {"first": 1.5123, "last": 2.3456},
    "domains": {"code": {"requests": 150, "acceptance_length": 2.5}, "": {"requests": 150, "acceptance_length": None}},
    "speedup": 1.3049,
    "versions_served": [0, 1, 7],
}


@pytest.fixture
def drafter() -> Eagle3Drafter:
    parts = TargetParts.of(tiny_target(dtype=torch.float32))
    return Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, 32, 2), feature_layers=(1, 2))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "summary.json").write_text(json.dumps(RUN))
    (tmp_path / "config.yaml").write_text("model: smollm2\nengine:\n  name: sglang\n")
    return tmp_path

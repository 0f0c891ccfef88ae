from __future__ import annotations

from pathlib import Path

import pytest
import torch
from drafters import perturbed

from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.testing import tiny_target


@pytest.fixture
def parts() -> TargetParts:
    """Frozen pieces of the tiny target, in float32."""
    return TargetParts.of(tiny_target(dtype=torch.float32))


@pytest.fixture
def saved_eagle3(parts: TargetParts, tmp_path: Path) -> tuple[Eagle3Drafter, Path]:
    """An EAGLE-3 of four tokens and the folder that holds it."""
    drafter = perturbed(Eagle3Drafter.from_target(parts, draft_vocab=torch.tensor([2, 7, 11, 30])))
    save_drafter(drafter, tmp_path / "drafter")
    return drafter, tmp_path / "drafter"

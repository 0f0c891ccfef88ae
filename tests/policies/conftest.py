from __future__ import annotations

import pytest
import torch

from aurora_rl.policies import TargetParts
from aurora_rl.testing import tiny_target


@pytest.fixture
def parts() -> TargetParts:
    """Frozen pieces of the tiny target, in float32."""
    return TargetParts.of(tiny_target(dtype=torch.float32))

"""Every objective in the harness that TorchRL's own losses are tested by.

The harness is in TorchRL's repository and not in its wheel: point TORCHRL_TEST_DIR at the `test` folder of a checkout
(github.com/pytorch/rl). Without it these tests are skipped; what they assert beyond the other tests here is small.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest
from tensordict import TensorDict
from tiny_drafters import eagle3_and_head
from tiny_recordings import trajectory_of

from aurora_rl.objectives import OBJECTIVES, Objective
from aurora_rl.policies import TreeShape
from aurora_rl.trajectories import pack

_FOLDER = os.environ.get("TORCHRL_TEST_DIR")
if _FOLDER is None:
    pytest.skip("TORCHRL_TEST_DIR names no checkout of TorchRL's tests", allow_module_level=True)
sys.path.insert(0, str(Path(_FOLDER) / "objectives"))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from _objectives_common import LossModuleTestBase, _check_td_steady

# The harness has a class-scoped fixture of a form that pytest will drop.
pytestmark = pytest.mark.filterwarnings("ignore:Class-scoped fixtures defined as instance methods")

DEFAULT_KEYS = {
    "hidden": ("sequence", "hidden"),
    "node_hidden": ("nodes", "hidden"),
    "accepted": ("nodes", "accepted"),
    "log_probs": ("nodes", "log_probs"),
}


@pytest.fixture(params=list(OBJECTIVES))
def loss(request: pytest.FixtureRequest) -> Objective:
    return OBJECTIVES.get(request.param)(*eagle3_and_head())


@pytest.fixture
def batch(loss: Objective) -> TensorDict:
    shape = TreeShape(3, 2, mode="sampled" if loss.sampled else "topk")
    return pack([trajectory_of(loss.drafter, request=i, shape=shape) for i in range(2)])


class TestHarness(LossModuleTestBase):
    def test_tensordict_keys(self, loss: Objective) -> None:
        self.tensordict_keys_test(loss, default_keys=DEFAULT_KEYS)

    def test_the_input_is_steady(self, loss: Objective, batch: TensorDict) -> None:
        with _check_td_steady(batch):
            loss(batch)[f"loss_{loss.name}"].backward()

    def test_gradients_reach_the_drafter_only(self, loss: Objective, batch: TensorDict) -> None:
        loss(batch)[f"loss_{loss.name}"].backward()
        learned = {name for name, p in loss.named_parameters() if p.grad is not None}
        assert learned and all(name.startswith("drafter.") for name in learned)

    def test_state_dict(self, loss: Objective, batch: TensorDict) -> None:
        loss.load_state_dict(loss.state_dict())
        assert all(name.startswith("drafter.") or name == "newest" for name in loss.state_dict())

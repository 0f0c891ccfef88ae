"""A learner of two processes: its steps are those of one, whatever the shares; errors and ends reach both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked_commands import Forks
from rank_processes import ended, start_ranks
from shared_steps import OBJECTIVES, stream

from aurora_rl.training.parallel import deal
from aurora_rl.trajectories import pack

PROGRAM = str(Path(__file__).parents[1] / "support" / "shared_steps.py")
ROUNDING = 1e-12  # of float64


@pytest.fixture(scope="module")
def ran(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """What scenarios of `shared_steps.py` found, by their names; all of them run in one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    names = ["every_objective", "not_finite", "states", "unlike"]
    statuses, outputs = ended(start_ranks(forks, folder, [PROGRAM, ",".join(names), str(folder)]), folder)
    assert statuses == [0, 0], "\n".join(outputs)
    return lambda name: json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize("objective", [*OBJECTIVES, "adapters", "muon"])
def test_value_gradient_and_steps_are_those_of_one_process(ran: Callable[..., dict[str, Any]], objective: str) -> None:
    found = ran("every_objective")[objective]
    assert 0 < found["norm"] < 1, "the gradient is clipped, or nothing is learned"
    assert found["gradient"] < ROUNDING and found["value"] < ROUNDING and found["metrics"] < 1e-6
    assert found["alike"], "the ranks have different weights"
    assert found["weights"] < (1e-3 if objective == "muon" else 1e-9)  # Muon computes in bfloat16


def test_a_step_that_is_not_finite_on_one_rank_is_taken_by_none(ran: Callable[..., dict[str, Any]]) -> None:
    found = ran("not_finite")
    assert found["kept"] == [1, 1] and found["alone"] == [True, False]
    assert found["theirs"] == found["ours"] == "loss is nan, its gradient's norm nan"


def test_a_training_state_goes_on_with_another_number_of_processes(ran: Callable[..., dict[str, Any]]) -> None:
    found = ran("states")
    assert found["weights"] < ROUNDING and found["newest"] == [5, 5]


@pytest.mark.parametrize(
    ("differs", "says"),
    [
        ("vocab", "has another target or draft vocabulary than rank 0; give all hosts the same model and the same"),
        ("lr", "has optimizers[0].param_groups[0].lr=0.01 (rank 0 has 0.001); start all ranks with the same config"),
        ("objectives", 'has objectives=["imitation", "discard", "imitation"] (rank 0 has ["imitation"]); start all'),
        ("settings", 'has dtype="bfloat16" (rank 0 has "float32"); start all ranks with the same configuration'),
        ("absent", "has drafter.options={} (rank 0 has None); start all ranks with the same configuration"),
    ],
)
def test_ranks_that_are_not_alike_are_refused_by_all(
    ran: Callable[..., dict[str, Any]], differs: str, says: str
) -> None:
    first, second = ran("unlike")[differs]
    assert first == second and first.startswith(f"rank 1 {says}") and "\n" not in first


def test_the_order_of_settings_is_no_difference(ran: Callable[..., dict[str, Any]]) -> None:
    assert ran("unlike")["alike"] == ["", ""]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(forks: Forks, tmp_path: Path, victim: int) -> None:
    statuses, outputs = ended(start_ranks(forks, tmp_path, [PROGRAM, f"lost{victim}", str(tmp_path)]), tmp_path)
    assert statuses[victim] == -9 and statuses[1 - victim] == 0, "\n".join(outputs)
    told = json.loads(outputs[1 - victim].splitlines()[-1])
    assert told["error"].startswith(f"rank {1 - victim} of 2 has lost the others: one of them has ended")
    assert told["steps"] == 2 and told["seconds"] < 20


def test_a_batch_is_dealt_out_by_its_tokens_and_a_small_one_goes_to_all() -> None:
    recorded = stream()
    for size in (1, 2, 3, 5):
        parts = deal(pack(recorded), size)
        assert sorted(r for part in parts for r in part["request"].tolist()) == [0, 1, 2, 3, 4]
        tokens = [len(part["sequence", "tokens"]) for part in parts]
        assert all(tokens) and max(tokens) - min(tokens) <= max(len(t["sequence", "tokens"]) for t in recorded)
    for part in deal(pack(recorded[:2]), 3):
        torch.testing.assert_close(part.to_dict(), pack(recorded[:2]).to_dict(), rtol=0, atol=0)

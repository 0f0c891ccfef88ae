"""Shards of weights and optimizer states on two processes: steps are those of one, and states go both ways."""

from __future__ import annotations

import json
from pathlib import Path

from forked_commands import Forks
from rank_processes import ended, start_ranks

PROGRAM = str(Path(__file__).parents[1] / "support" / "shared_steps.py")


def test_steps_on_shards_are_those_of_one_process_and_states_go_both_ways(forks: Forks, tmp_path: Path) -> None:
    statuses, outputs = ended(start_ranks(forks, tmp_path, [PROGRAM, "sharded", str(tmp_path)]), tmp_path)
    assert statuses == [0, 0], "\n".join(outputs)
    for optimizer, found in json.loads((tmp_path / "sharded.json").read_text()).items():
        # Muon computes in bfloat16, where another order of sums shows.
        rounding = 1e-2 if optimizer == "muon" else 1e-12
        assert found["value"] < 1e-12 and found["metrics"] < 1e-12
        assert found["held"] == [found["parameters"] / 2] * 2, "a rank holds more than its share of the weights"
        assert max(found["first"], found["weights"], found["restored"]) < rounding, (optimizer, found)
        assert found["served"] < 1e-6  # in float32

"""Ranks of a server: what one does alone. test_swaps.py has two processes."""

from __future__ import annotations

import torch

from aurora_rl.envs.sglang.ranks import EngineRanks


def test_one_rank_decides_alone() -> None:
    ranks, tensor = EngineRanks(), torch.arange(3)
    ranks.broadcast(tensor)
    assert ranks.vote(fault="x", version=2) == [{"fault": "x", "version": 2}]
    assert ranks.gather(tensor)[0] is tensor and ranks.unfit() == ""
    assert ranks.fault_of([{"fault": "x"}]) == "x" and ranks.fault_of([{"fault": ""}]) == ""

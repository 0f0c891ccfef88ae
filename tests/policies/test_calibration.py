"""The time of a round by the shape of its trees."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from oracle_server import DEPTH, Oracle, Serving, eagle, requests
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.policies import Proposal, TreeShape
from aurora_rl.policies.calibration import DrafterError, measure_rounds
from aurora_rl.policies.tree_controller import TreeController


def test_measure_rounds_leaves_no_trace(tmp_path: Path) -> None:
    waiting = requests(3)
    serving = Serving(tmp_path, waiting, eagle(), slots=3)
    shapes = TreeController.candidates(TreeShape(DEPTH))
    costs = measure_rounds(serving.engine, serving.policy, waiting[2], shapes, repeats=2)
    assert sorted(costs) == [1, 2, 3] and all(list(by_shape) == shapes for by_shape in costs.values())
    for count, by_shape in costs.items():
        seconds = [by_shape[shape] for shape in shapes]
        assert 0 < seconds[0] and seconds == sorted(seconds)  # nothing that does more is cheaper
        assert count == 1 or by_shape[shapes[1]] >= costs[count - 1][shapes[1]]
    assert serving.policy.shape == TreeShape(DEPTH)
    assert serving.engine.store.lengths.tolist() == [0, 0, 0] and serving.engine.prefill_seconds == 0
    fresh = Serving(tmp_path / "fresh", waiting, eagle(), slots=3)
    # The same drafts as a server that measured nothing, hence the same acceptance.
    assert list(serving.run().stats.finished) == list(fresh.run().stats.finished)
    serving.check_texts()


def test_measured_costs_are_those_of_undisturbed_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = Serving(tmp_path, waiting := requests(1), eagle(), slots=1)
    policy, shapes = serving.policy, TreeController.candidates(TreeShape(DEPTH))
    clock, rounds, forward = [0.0], itertools.count(), policy.forward

    def timed(td: TensorDict) -> TensorDict:
        number = next(rounds)
        # A machine that slows down, holds up a round in nine, and hurries another.
        clock[0] += (1 + policy.shape.depth) * (1 + number / 200) * {4: 5.0, 6: 0.3}.get(number % 9, 1.0)
        return forward(td)

    monkeypatch.setattr(policy, "forward", timed)
    monkeypatch.setattr("aurora_rl.policies.calibration.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    seconds = measure_rounds(serving.engine, policy, waiting[0], shapes)[1]
    assert [seconds[shape] / seconds[shapes[0]] for shape in shapes] == pytest.approx([1, 2, 3, 4], rel=0.05)


def test_a_fault_while_rounds_are_measured_leaves_the_engine_free(tmp_path: Path) -> None:
    class NotANumber(Oracle):
        def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
            proposal = super().propose(slots, shape, generator)
            return proposal._replace(log_probs=torch.full_like(proposal.log_probs, float("nan")))

    waiting = requests(2, budget=22)
    serving = Serving(tmp_path, waiting, NotANumber(waiting), slots=2)
    with pytest.raises(DrafterError, match="NotANumber failed: ValueError.*not a number"):
        measure_rounds(serving.engine, serving.policy, waiting[1], [TreeShape(0), TreeShape(DEPTH)])
    assert not len(serving.engine.store.occupied) and serving.policy.shape == TreeShape(DEPTH)

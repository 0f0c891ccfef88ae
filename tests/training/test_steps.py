"""Optimizer steps: what is learned from and how often, which loss is summed, and steps that are not finite."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tiny_streams import Seen, drafter_and_loss, stream
from torchrl.objectives import LossModule

from aurora_rl.objectives import SumLoss, make_objectives
from aurora_rl.policies import TargetParts
from aurora_rl.testing import tiny_target
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_on, train_step
from aurora_rl.trajectories import pack


def test_each_is_new_once_and_replayed_with_what_came_before() -> None:
    loss = Seen()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    seen = [n for n, _, _ in train_on(stream(11), loss, [optimizer], batch_size=4, replay=3)]  # type: ignore[arg-type]
    assert seen == [4, 8, 11] and loss.batches[8] == [8, 9, 10]  # the last batch has what is left
    assert loss.batches[0] == [0, 1, 2, 3] and loss.batches[4] == [4, 5, 6, 7]
    assert len(loss.batches) == 12
    assert set(Counter(r for batch in loss.batches[1:4] for r in batch)) <= {0, 1, 2, 3}
    assert any(r >= 4 for batch in loss.batches[5:] for r in batch)


def test_the_losses_are_summed_and_the_gradient_clipped() -> None:
    loss = Seen((3.0, 4.0))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    value, out = train_step(loss, [optimizer], pack(stream(1)), autocast=False)  # type: ignore[arg-type]
    assert value == 7.0 and set(out.keys()) == {"loss_a", "loss_b", "metric"}
    assert loss.weight.grad is None  # it would take memory next to the next forward
    torch.testing.assert_close(loss.weight.detach(), 1 - torch.tensor([0.6, 0.8]))  # (3, 4) has norm 5


def test_the_batch_is_moved_to_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    moved = []
    batch = pack(stream(1))
    monkeypatch.setattr(TensorDict, "to", lambda self, device: moved.append(device) or self)
    loss = Seen()
    train_step(loss, [torch.optim.SGD(loss.parameters(), lr=1.0)], batch, autocast=False)  # type: ignore[arg-type]
    assert moved == [loss.weight.device]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_not_taken(bad: float) -> None:
    loss = Seen((bad, 1.0))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    with pytest.raises(FloatingPointError, match="loss is (nan|inf), its gradient's norm"):
        train_step(loss, [optimizer], pack(stream(1)), autocast=False)  # type: ignore[arg-type]
    assert loss.weight.tolist() == [1.0, 1.0]


def test_learning_from_a_recording_passes_over_such_a_step(caplog: pytest.LogCaptureFixture) -> None:
    class Flawed(Seen):
        def forward(self, batch: TensorDictBase) -> TensorDict:
            self.values = (float("nan"), 1.0) if len(self.batches) in self.bad else (1.0, 2.0)
            return super().forward(batch)

    loss = Flawed()
    optimizer, loss.bad = torch.optim.SGD(loss.parameters(), lr=0.0), {0, 3, 4}
    reasons: list[str] = []
    steps = train_on(stream(8), loss, [optimizer], replay=3, max_skipped=2, on_skip=reasons.append)  # type: ignore[arg-type]
    assert [value for _, value, _ in steps] == [3.0, 3.0] and len(loss.batches) == 8
    assert len(reasons) == 3 and all("loss is nan" in reason for reason in reasons)
    assert [r.message[:43] for r in caplog.records] == [
        f"a step was skipped after {n} trajectories: lo" for n in (0, 0, 4)
    ]
    loss.bad = set(range(8, 16))
    with pytest.raises(FloatingPointError, match="loss is nan"):
        list(train_on(stream(8), loss, [optimizer], replay=3, max_skipped=2))  # type: ignore[arg-type]
    assert len(loss.batches) == 11


@pytest.mark.parametrize("settings", [{"name": "discard"}, {"name": "expected_length", "contexts": "trees"}])
def test_a_recording_without_drafts_that_an_objective_needs_is_an_error_at_its_end(settings: dict[str, str]) -> None:
    drafter, _ = drafter_and_loss()
    losses = SumLoss(
        make_objectives([{"name": "imitation"}, settings], drafter, TargetParts.of(tiny_target()).head.float())
    )
    optimizers = drafter_optimizers(drafter, muon_lr=0.0, adam_lr=0.0)
    steps = train_on(stream(8, depth=0), losses, optimizers, replay=1)
    assert [next(steps)[0], next(steps)[0]] == [4, 8]
    with pytest.raises(ValueError, match=f"'{settings['name']}' learns from drafted nodes, and the first 4 batches"):
        next(steps)
    # With drafts in the last request alone it is none, and imitation needs none.
    late = [*stream(8, depth=0)[:7], stream(8)[7]]
    assert len(list(train_on(late, losses, optimizers, replay=0))) == 2
    assert len(list(train_on(stream(8, depth=0), drafter_and_loss()[1], optimizers, replay=0))) == 2


def test_a_stream_shorter_than_a_batch_is_an_error() -> None:
    loss = Seen()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="3 requests, fewer than the batch_size=4"):
        next(train_on(stream(3), loss, [optimizer]))  # type: ignore[arg-type]


def test_it_learns() -> None:
    (drafter, loss), recorded = drafter_and_loss(), stream(8)
    assert isinstance(loss, LossModule)

    def value() -> float:
        return float(loss(pack(recorded))["loss_imitation"].detach())

    before = value()
    for _ in train_on(recorded, loss, drafter_optimizers(drafter, muon_lr=0.02, adam_lr=3e-3), replay=8):
        pass
    assert value() < 0.8 * before


# ---- epochs ---------------------------------------------------------------------------------------------------------

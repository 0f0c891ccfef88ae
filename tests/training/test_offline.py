"""Optimizer steps: what is learned from and how often, which loss is summed, and steps that are not finite."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import nn
from torchrl.objectives import LossModule

from aurora_rl.objectives import ImitationLoss, SumLoss, make_objectives
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.training.gate import replay
from aurora_rl.training.offline import OfflineTrainer, replay_groups, train_on, train_step
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.trajectories import pack


def drafter_and_loss() -> tuple[Eagle3Drafter, ImitationLoss]:
    parts = TargetParts.of(tiny_target())
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16)).float()
    return drafter, ImitationLoss(drafter, parts.head.float(), steps=2)


def stream(count: int, depth: int = 3) -> list[TensorDict]:
    drafter, _ = drafter_and_loss()
    return [tiny_trajectory(drafter, request=i, max_new_tokens=4, shape=TreeShape(depth)) for i in range(count)]


class Seen(nn.Module):
    """A loss that notes the requests of every batch; its two values are those that it is told."""

    def __init__(self, values: tuple[float, float] = (1.0, 2.0)) -> None:
        super().__init__()
        self.weight, self.values, self.batches = nn.Parameter(torch.ones(2)), values, []

    def forward(self, batch: TensorDictBase) -> TensorDict:
        self.batches.append(batch["request"].tolist())
        first, second = self.values
        losses = {"loss_a": first * self.weight[0], "loss_b": second * self.weight[1], "metric": 7 * self.weight[0]}
        return TensorDict(losses, batch_size=[])


def test_each_is_new_once_and_replayed_with_what_came_before() -> None:
    loss = Seen()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    seen = [n for n, _, _ in train_on(stream(11), loss, [optimizer], batch_size=4, replay=3)]  # type: ignore[arg-type]
    assert seen == [4, 8]  # three are no batch
    assert loss.batches[0] == [0, 1, 2, 3] and loss.batches[4] == [4, 5, 6, 7]
    assert len(loss.batches) == 8
    assert set(Counter(r for batch in loss.batches[1:4] for r in batch)) <= {0, 1, 2, 3}
    assert any(r >= 4 for batch in loss.batches[5:] for r in batch)


def test_the_losses_are_summed_and_the_gradient_clipped() -> None:
    loss = Seen((3.0, 4.0))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    value, out = train_step(loss, [optimizer], pack(stream(1)), autocast=False)  # type: ignore[arg-type]
    assert value == 7.0 and set(out.keys()) == {"loss_a", "loss_b", "metric"}
    assert loss.weight.grad is None  # it would take memory next to the next forward
    torch.testing.assert_close(loss.weight.detach(), 1 - torch.tensor([0.6, 0.8]))  # (3, 4) has norm 5


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


def trainer(stream: list[TensorDict], **settings: Any) -> tuple[OfflineTrainer, Eagle3Drafter]:
    torch.manual_seed(0)
    drafter, loss = drafter_and_loss()
    return OfflineTrainer(
        drafter, loss, drafter_optimizers(drafter, muon_lr=0.02, adam_lr=5e-4), stream, **settings
    ), drafter


def test_an_epoch_has_each_trajectory_once_in_an_order_of_its_own() -> None:
    loss, drafter = Seen(), drafter_and_loss()[0]
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.0)
    epochs = OfflineTrainer(drafter, loss, [optimizer], stream(7), batch_size=2)  # type: ignore[arg-type]
    assert epochs.batches_per_epoch == 3
    for _ in range(6):
        assert epochs.step() is not None
    first, second = (sum(loss.batches[i : i + 3], []) for i in (0, 3))
    assert len(set(first)) == len(set(second)) == 6 and first != second
    assert set(first) | set(second) <= set(range(7))


def test_a_resumed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    recorded = stream(5)
    whole, expected = trainer(recorded, batch_size=2, seed=3)
    for _ in range(5):
        whole.step()
    begun, _ = trainer(recorded, batch_size=2, seed=3)
    for _ in range(3):
        begun.step()
    begun.save(tmp_path / "state", note="kept")
    resumed, drafter = trainer(recorded, batch_size=2, seed=3)
    progress = resumed.resume(tmp_path / "state")
    assert progress["note"] == "kept" and (resumed.batches, progress["seen"], progress["steps"]) == (3, 6, 3)
    for _ in range(2):
        resumed.step()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(drafter.state_dict()[name], tensor)


def test_a_state_of_another_draft_vocabulary_is_refused(tmp_path: Path) -> None:
    recorded = stream(2)
    begun, drafter = trainer(recorded, batch_size=2)
    begun.save(tmp_path / "state")
    resumed, drafter = trainer(recorded, batch_size=2)
    drafter.draft_vocab = drafter.draft_vocab + 1
    with pytest.raises(CheckpointError, match="another draft vocabulary"):
        resumed.resume(tmp_path / "state")


def test_steps_that_are_not_finite_are_counted_up_to_a_limit() -> None:
    loss = Seen((float("nan"), 1.0))
    optimizer = torch.optim.SGD(loss.parameters(), lr=1.0)
    epochs = OfflineTrainer(
        drafter_and_loss()[0],
        loss,  # type: ignore[arg-type]
        [optimizer],
        stream(2),
        batch_size=1,
        max_skipped=2,
    )
    assert epochs.step() is None and epochs.step() is None
    loss.values = (1.0, 1.0)
    assert epochs.step() is not None and epochs.skipped == 2
    loss.values = (float("inf"), 1.0)
    assert epochs.step() is None and epochs.step() is None
    with pytest.raises(FloatingPointError):
        epochs.step()
    assert (epochs.batches, epochs.skipped) == (6, 5)


def test_fewer_trajectories_than_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="there are 1 trajectories, fewer than the batch_size=2 of a step"):
        trainer(stream(1), batch_size=2)


def test_an_epoch_without_a_node_is_an_error_of_what_learns_from_nodes() -> None:
    drafter, _ = drafter_and_loss()
    parts = TargetParts.of(tiny_target())
    loss = SumLoss(make_objectives([{"name": "discard"}], drafter, parts.head.float()))
    optimizers = drafter_optimizers(drafter, muon_lr=0.02, adam_lr=5e-4)
    recorded = stream(2, depth=0)
    epochs = OfflineTrainer(drafter, loss, optimizers, recorded, batch_size=1)
    epochs.step()
    with pytest.raises(ValueError, match="node"):
        epochs.step()


def test_groups_are_replayed_a_few_at_a_time_as_all_at_once() -> None:
    drafter, _ = drafter_and_loss()
    drafter = drafter.double()
    recorded = [tiny_trajectory(drafter, request=i, max_new_tokens=6 + i) for i in range(5)]
    groups = replay_groups(drafter, {"a": recorded[:3], "b": recorded[3:]}, TreeShape(3), at_once=2)
    whole = replay(drafter, recorded, TreeShape(3))
    assert torch.equal(torch.cat([groups["a"].tokens, groups["b"].tokens]), whole.tokens)
    assert torch.equal(torch.cat([groups["a"].rounds, groups["b"].rounds]), whole.rounds)

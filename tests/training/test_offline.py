"""Learning in epochs: orders, resuming, steps that are not finite, and replay by group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tiny_streams import Seen, drafter_and_loss, stream

from aurora_rl.objectives import SumLoss, make_objectives
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.storage import CheckpointError
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.training import offline
from aurora_rl.training.gate import replay
from aurora_rl.training.offline import OfflineTrainer, replay_groups
from aurora_rl.training.optimizers import drafter_optimizers


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


def test_groups_are_replayed_a_few_at_a_time_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "_MAX_REPLAYED", 2)
    drafter, _ = drafter_and_loss()
    drafter = drafter.double()
    recorded = [tiny_trajectory(drafter, request=i, max_new_tokens=6 + i) for i in range(5)]
    groups = replay_groups(drafter, {"a": recorded[:3], "b": recorded[3:]}, TreeShape(3))
    whole = replay(drafter, recorded, TreeShape(3))
    assert torch.equal(torch.cat([groups["a"].tokens, groups["b"].tokens]), whole.tokens)
    assert torch.equal(torch.cat([groups["a"].rounds, groups["b"].rounds]), whole.rounds)

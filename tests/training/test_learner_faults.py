"""Steps that are not finite, and disks that are full: the learner keeps its last good state and goes on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from learner_loops import HANDSHAKE, Make, drain, send, step_until
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.policies import Eagle3Drafter
from aurora_rl.training.states import states


@pytest.mark.parametrize(
    "poison",
    [
        lambda drafter: drafter.fc.weight.sum() * math.nan,
        lambda drafter: drafter.fc.weight.sum() * math.inf,
        lambda drafter: (drafter.fc.weight * 0).abs().sqrt().sum(),  # 0, whose gradient is not a number
    ],
)
def test_a_step_that_is_not_finite_is_skipped_and_logged(
    make: Make, served: list[TensorDict], poison: Callable[[Eagle3Drafter], Tensor]
) -> None:
    loop = make()
    before = {name: value.clone() for name, value in loop.drafter.state_dict().items()}
    loop.loss.poison = poison
    send(loop, served[:2])
    step_until(loop, lambda: loop.loss.batches)
    assert len(loop.events("step_skipped")) == 1
    assert not loop.events("train")
    assert loop.learner.steps == 0
    assert all(torch.equal(value, before[name]) for name, value in loop.drafter.state_dict().items())
    loop.loss.poison = None
    send(loop, served[2:4])
    step_until(loop, lambda: loop.events("train"))
    assert loop.learner.steps == 1
    assert all(value.isfinite().all() for value in loop.drafter.state_dict().values())


def test_a_good_step_between_them_starts_the_count_anew(make: Make, served: list[TensorDict]) -> None:
    loop = make(max_skipped=1, batch_size=2, replay=0)
    for number in range(4):  # bad, good, bad, good
        loop.loss.poison = None if number % 2 else lambda drafter: drafter.fc.weight.sum() * math.nan
        send(loop, served[2 * number : 2 * number + 2])
        step_until(loop, lambda wanted=number + 1: loop.learner.skipped + loop.learner.steps == wanted)
    assert loop.learner.skipped == 2 and loop.learner.steps == 2


def test_too_many_such_steps_in_a_row_stop_the_learner_and_keep_its_last_good_state(
    make: Make, served: list[TensorDict]
) -> None:
    loop = make(gate=2, publish_every=2, max_skipped=2)
    send(loop, served[:2])
    step_until(loop, lambda: loop.events("candidate"))
    send(loop, served[2:4])
    step_until(loop, lambda: loop.learner.version)
    loop.learner._publish_every = 10_000  # what is learned from now on is not published
    drain(loop)
    send(loop, served[4:8])
    drain(loop)
    loop.loss.poison = lambda drafter: drafter.fc.weight.sum() * math.nan
    send(loop, served[8:20])
    with pytest.raises(
        FloatingPointError, match="3 steps in a row had no finite loss .* last good training state is in"
    ):
        drain(loop)
    assert loop.learner.skipped == 3
    kept = load_file(states(loop.states)[0] / "model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in kept.values())
    # Those of the last good step, and not of the last that was published.
    published = loop.learner._serving
    for name, value in loop.drafter.state_dict().items():
        assert bool(value.isfinite().all()) and torch.equal(kept[f"module.{name}"], value)
    assert not torch.equal(kept["module.fc.weight"], published["fc.weight"])


def test_what_was_learned_before_such_steps_is_kept_though_nothing_was_published_since(
    make: Make, served: list[TensorDict]
) -> None:
    loop = make(max_skipped=2)
    send(loop, served[:4])
    step_until(loop, lambda: loop.learner.steps == 2)
    learned = {name: value.clone() for name, value in loop.drafter.state_dict().items()}
    assert not loop.states.exists()
    loop.loss.poison = lambda drafter: drafter.fc.weight.sum() * math.nan
    send(loop, served[4:20])
    with pytest.raises(FloatingPointError, match="last good training state is in"):
        drain(loop)
    again = make()
    again.learner.resume(loop.states)
    assert (again.learner.seen, again.learner.steps) == (4, 2)
    assert all(torch.equal(value, learned[name]) for name, value in again.drafter.state_dict().items())


def test_weights_that_are_not_finite_do_not_replace_the_last_good_state(make: Make, served: list[TensorDict]) -> None:
    loop = make(max_skipped=2)
    with torch.no_grad():
        loop.drafter.fc.weight.fill_(math.inf)  # as a finite gradient and a learning rate far too high leave it
    send(loop, served[:20])
    with pytest.raises(FloatingPointError, match="no good state was saved; lower the learning rate"):
        drain(loop)
    assert not loop.states.exists()


def test_replay_is_owed_for_new_requests_only_and_does_not_pile_up(make: Make, served: list[TensorDict]) -> None:
    loop = make(batch_size=2, replay=3, muon_lr=0.0, adam_lr=0.0)
    send(loop, served[:40])
    drain(loop)
    new = [event["new"] for event in loop.events("train")]
    assert new == [2] * 20 + [0] * 12  # new requests come first; four batches' worth of replay is kept
    assert loop.learner.step(wait_s=0.0) is False


def test_what_cannot_be_written_does_not_end_learning(
    make: Make, served: list[TensorDict], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*args: object) -> None:
        raise OSError("the disk is full")

    loop = make(publish_every=2, gate=2)
    monkeypatch.setattr("aurora_rl.training.learner.save_training_state", full)
    send(loop, served[:12])
    drain(loop)
    steps = loop.learner.steps
    send(loop, served[12:20])  # the gate judges on what comes after the candidate
    step_until(loop, lambda: loop.learner.version >= 1)
    drain(loop)
    assert loop.learner.steps > steps > 0
    assert {event["what"] for event in loop.events("not_written")} == {"the training state"}
    assert [r.message for r in caplog.records] == [
        "the training state was not written, and the run goes on: the disk is full"
    ]
    (told,) = loop.learner.outputs.failures.values()
    assert told.startswith("the training state could not be written") and told.endswith(": the disk is full")
    with pytest.raises(OSError, match="the disk is full"):
        loop.learner.save()
    monkeypatch.undo()
    loop.learner.save()  # makes good for those that failed
    assert not loop.learner.outputs.failures
    assert [event["steps"] for event in loop.events("checkpoint")] == [loop.learner.steps]


def test_a_learner_that_stops_says_that_its_last_state_was_not_written(
    make: Make, served: list[TensorDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("the disk is full")

    loop = make(max_skipped=0)
    loop.learner.save()
    monkeypatch.setattr("aurora_rl.training.learner.save_training_state", full)
    loop.loss.poison = lambda drafter: drafter.fc.weight.sum() * math.nan
    send(loop, served[:2])
    with pytest.raises(FloatingPointError, match="the training state could not .* full; an older one is in .*learner;"):
        drain(loop)


def dropped(loop: SimpleNamespace) -> Counter[str]:
    return sum((Counter(event["reasons"]) for event in loop.events("drops")), Counter())


def test_what_is_refused_is_told_by_reason_although_no_step_is_taken(make: Make, served: list[TensorDict]) -> None:
    loop = make(engine=replace(HANDSHAKE, draft_map_checksum="other"))
    send(loop, served[:3])
    step_until(loop, lambda: dropped(loop))
    loop.learner.close()  # tells what came within the last second
    assert dropped(loop) == {"handshake": 3} and not loop.events("train")
    assert {event["steps"] for event in loop.events("drops")} == {0}


def test_what_a_full_buffer_lets_go_of_before_its_turn_is_told(
    make: Make, served: list[TensorDict], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aurora_rl.training.wire_notes._NOTE_S", 0.0)
    loop = make(buffer=4, batch_size=2)
    send(loop, served[:12])
    step_until(loop, lambda: loop.learner.seen + dropped(loop).total() == 12)
    assert set(dropped(loop)) == {"buffer_full"} and loop.learner.seen >= 4


def test_a_trajectory_that_spoils_every_step_is_dropped_with_its_source_and_learning_goes_on(
    make: Make, served: list[TensorDict], caplog: pytest.LogCaptureFixture
) -> None:
    loop = make(max_skipped=0, batch_size=2, replay=3)
    send(loop, served[:2])
    step_until(loop, lambda: loop.learner.steps)  # there is a trajectory that a step was taken on
    loop.loss.poison = lambda drafter: drafter.fc.weight.sum() * (math.nan if 3 in loop.loss.batches[-1] else 1.0)
    send(loop, served[2:6])
    drain(loop)
    (event,) = loop.events("quarantined")
    source = loop.sink._meta["engine"]
    assert event["requests"] == [3] and event["sources"] == [source] and "loss is nan" in event["reason"]
    assert f"requests [3] of ['{source}'] are dropped" in caplog.text
    assert not loop.events("step_skipped") and loop.learner.skipped == 0 and loop.learner.seen == 4
    found = next(i for i, batch in enumerate(loop.loss.batches) if batch == [3])
    assert not any(3 in batch for batch in loop.loss.batches[found + 1 :])
    assert any(2 in batch for batch in loop.loss.batches[found + 1 :])  # its neighbour is replayed
    loop.learner.close()
    assert dropped(loop) == {"quarantined": 1}


def test_where_no_trajectory_gives_a_step_none_is_dropped(make: Make, served: list[TensorDict]) -> None:
    loop = make(max_skipped=9, batch_size=2)
    send(loop, served[:2])
    step_until(loop, lambda: loop.learner.steps)
    loop.loss.poison = lambda drafter: drafter.fc.weight.sum() * math.nan
    send(loop, served[2:4])
    step_until(loop, lambda: loop.learner.skipped)
    assert not loop.events("quarantined") and len(loop.learner._replayed.of_requests(range(4))) == 4

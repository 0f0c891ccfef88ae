"""A learner that goes on from a training state: what is served stays, and what it learned is gated first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from learner_loops import Make, drain, send, step_until, wait
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.storage import CheckpointError
from aurora_rl.training import learner as learners
from aurora_rl.training.states import states


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def received(loop: SimpleNamespace, version: int) -> dict[str, Tensor]:
    """The weights of a version as the engine gets them."""
    found: list[tuple[int, TensorDict]] = []
    wait(lambda: (latest := loop.receiver.latest()) is not None and (found.append(latest) or latest[0] == version))
    return dict(found[-1][1].flatten_keys(".").items())


@pytest.fixture
def first(make: Make, served: list[TensorDict]) -> SimpleNamespace:
    """A learner that has published version 1, learned on, and saved."""
    loop = make(batch_size=2, gate=2, publish_every=2)
    send(loop, served[:2])
    step_until(loop, lambda: loop.events("candidate"))
    send(loop, served[2:4])
    step_until(loop, lambda: loop.learner.version == 1)
    loop.learner._publish_every = 10_000
    drain(loop)
    send(loop, served[4:8])
    drain(loop)
    loop.learner.save()
    loop.learner.close()
    return loop


def test_resume_publishes_what_was_served_at_once_and_the_rest_once_the_gate_passes_it(
    make: Make, served: list[TensorDict], first: SimpleNamespace
) -> None:
    learned, published = first.drafter.state_dict(), first.learner._serving
    assert not same({name: published[name] for name in learned}, learned)

    second = make(batch_size=2, gate=2, publish_every=2)
    second.learner.resume(first.checkpoint)
    assert (second.learner.seen, second.learner.steps, second.learner.version) == (8, first.learner.steps, 2)
    assert same(second.drafter.state_dict(), learned)
    assert same(received(second, 2), published)
    (resumed,) = second.events("resumed")
    assert resumed["state"] == str(first.checkpoint / "000002") and resumed["skipped"] == []

    # What was learned since is a candidate: it is compared with what is served.
    send(second, served[8:10])
    step_until(second, lambda: len(second.events("candidate")) == 2)
    send(second, served[10:12])
    step_until(second, lambda: second.learner.version == 3)
    assert same(received(second, 3), second.learner._serving) and not same(second.learner._serving, published)


def test_weights_that_an_engine_rejects_after_the_resume_are_replaced_by_those_before(
    make: Make, first: SimpleNamespace
) -> None:
    before = first.learner._replaced
    second = make()
    second.learner.resume(first.checkpoint)
    received(second, 2)
    second.receiver.reject(2, "rolled back after 80 rounds")
    step_until(second, lambda: second.events("rejected"))
    assert same(second.learner._serving, before)


def test_a_state_of_train_is_learned_from_and_published_once_the_gate_passes_it(
    make: Make, first: SimpleNamespace
) -> None:
    flat = first.checkpoint.parent / "trained"
    progress = {"seen": 8, "steps": 4, "version": 0, "draft_vocab": first.learner._draft_vocab()}
    learners.save_training_state(flat, first.drafter, first.learner._optimizers, progress)
    second = make()
    second.learner.resume(flat)
    assert same(second.drafter.state_dict(), first.drafter.state_dict())
    assert second.learner.version == 0 and second.receiver.latest() is None


def test_a_broken_state_is_passed_over_with_one_line(
    make: Make, first: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = states(first.checkpoint)
    with open(newest / "progress.json", "a") as file:
        file.write(" ")
    second = make()
    second.learner.resume(first.checkpoint)
    assert second.learner.steps == 1 and second.learner.version == 2
    (line,) = [record.message for record in caplog.records]
    assert line == (
        f"learning goes on from the older state {older}, as newer ones are broken: {newest}: progress.json is not what "
        "was written"
    )
    assert second.events("resumed")[0]["skipped"] == [f"{newest}: progress.json is not what was written"]


def test_where_no_state_is_whole_one_error_says_so(make: Make, first: SimpleNamespace) -> None:
    for state in states(first.checkpoint):
        (state / "model.safetensors").write_bytes(b"")
    second = make()
    before = {name: value.clone() for name, value in second.drafter.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"learner: no training state can be used: .*000002: .*; .*000001: .*; le"
    ):
        second.learner.resume(first.checkpoint)
    assert same(second.drafter.state_dict(), before) and second.learner.version == 0


def test_a_state_that_does_not_fit_changes_nothing(make: Make) -> None:
    first = make(vocab=16)
    first.learner.save()
    second = make(vocab=16)
    with torch.no_grad():
        second.drafter.fc.weight.add_(1)
    before = {name: value.clone() for name, value in second.drafter.state_dict().items()}
    second.drafter.draft_vocab += 1
    with pytest.raises(CheckpointError, match="trained with another draft vocabulary; set drafter.path"):
        second.learner.resume(first.checkpoint)
    assert second.learner.version == 0 and same(second.drafter.state_dict(), before)


def test_only_so_many_states_are_kept(make: Make, tmp_path: object) -> None:
    loop = make()
    for _ in range(5):
        loop.learner.save()
    assert [state.name for state in states(loop.checkpoint)] == ["000005", "000004", "000003"]

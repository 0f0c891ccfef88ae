"""A learner that goes on from a training state: what is served stays, and what it learned is gated first."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from learner_loops import PARTS, SHAPE, Make, day0, drain, publish_first, send, step_until
from processes import wait
from safetensors.torch import load_file
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.adaptation.simulation import LocalWire
from aurora_rl.collectors.codec import checksum
from aurora_rl.objectives.imitation import ImitationLoss
from aurora_rl.storage import CheckpointError
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.training import learner as learners
from aurora_rl.training.gate import Gate
from aurora_rl.training.learner import Learner
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.training.states import states


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def as_tensors(values: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value) for name, value in values.items()}


def received(loop: SimpleNamespace, version: int) -> dict[str, Tensor]:
    """The weights of a version as the engine gets them."""
    found: list[tuple[int, TensorDict]] = []
    wait(lambda: (latest := loop.receiver.latest()) is not None and (found.append(latest) or latest[0] == version))
    return dict(found[-1][1].flatten_keys(".").items())


@pytest.fixture
def first(make: Make, served: list[TensorDict]) -> SimpleNamespace:
    """A learner that has published version 1, learned on, and saved."""
    loop = make(batch_size=2, gate=2, publish_every=2)
    publish_first(loop, served)
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
    second.learner.resume(first.states)
    assert (second.learner.seen, second.learner.steps, second.learner.version) == (8, first.learner.steps, 2)
    assert same(second.drafter.state_dict(), learned)
    assert same(received(second, 2), published)
    (resumed,) = second.events("resumed")
    assert resumed["state"] == str(first.states / "000002") and resumed["skipped"] == []
    assert resumed["version"] == 2

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
    second.learner.resume(first.states)
    received(second, 2)
    second.receiver.reject(2, "rolled back after 80 rounds")
    step_until(second, lambda: second.events("rejected"))
    assert same(second.learner._serving, before)


def test_a_state_of_train_is_learned_from_and_published_once_the_gate_passes_it(
    make: Make, first: SimpleNamespace
) -> None:
    flat = first.states.parent / "trained"
    progress = {
        "seen": 8,
        "steps": 4,
        "version": 0,
        "draft_vocab": checksum({"draft_vocab": first.drafter.draft_vocab}),
    }
    learners.save_training_state(flat, first.drafter, first.learner._optimizers, progress)
    second = make()
    second.learner.resume(flat)
    assert same(second.drafter.state_dict(), first.drafter.state_dict())
    assert second.learner.version == 0 and second.receiver.latest() is None


def test_a_broken_state_is_passed_over_with_one_line(
    make: Make, first: SimpleNamespace, caplog: pytest.LogCaptureFixture
) -> None:
    newest, older = states(first.states)
    with open(newest / "progress.json", "a") as file:
        file.write(" ")
    second = make()
    second.learner.resume(first.states)
    assert second.learner.steps == 1 and second.learner.version == 2
    (line,) = [record.message for record in caplog.records]
    assert line == (
        f"learning goes on from the older state {older}, as newer ones are broken: {newest}: progress.json is not what "
        "was written"
    )
    assert second.events("resumed")[0]["skipped"] == [f"{newest}: progress.json is not what was written"]


def test_where_no_state_is_whole_one_error_says_so(make: Make, first: SimpleNamespace) -> None:
    for state in states(first.states):
        (state / "model.safetensors").write_bytes(b"")
    second = make()
    before = {name: value.clone() for name, value in second.drafter.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"learner: no training state can be used: .*000002: .*; .*000001: .*; le"
    ):
        second.learner.resume(first.states)
    assert same(second.drafter.state_dict(), before) and second.learner.version == 0


def test_a_state_that_does_not_fit_changes_nothing(make: Make) -> None:
    first = make(vocab=range(16))
    first.learner.save()
    second = make(vocab=range(1, 17))
    with torch.no_grad():
        second.drafter.fc.weight.add_(1)
    before = {name: value.clone() for name, value in second.drafter.state_dict().items()}
    with pytest.raises(CheckpointError, match="is of another draft vocabulary; set drafter.path"):
        second.learner.resume(first.states)
    assert second.learner.version == 0 and same(second.drafter.state_dict(), before)


def test_a_learner_that_did_not_resume_says_what_its_gate_compares_with(
    make: Make, first: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aurora_rl.training.wire_notes._NOTE_S", 0.0)
    day0, published = make().learner._serving, first.learner._serving
    for number, (version, weights, says) in enumerate(
        [(0, day0, []), (7, day0, [(7, True)]), (7, published, [(7, False)]), (0, published, [(0, False)])]
    ):
        loop = make(version=version, checksum=checksum(weights))
        before = len(loop.events("gate_against"))
        wait(lambda loop=loop: loop.publisher.served)
        for _ in range(3):
            loop.learner.step(wait_s=0.0)
        told = [(event["version"], event["same"]) for event in loop.events("gate_against")[before:]]
        assert told == says, number
    warned = [record.message for record in caplog.records]
    assert len(warned) == 2 and "serves version 7, whose weights this learner does not have: until it" in warned[0]
    assert "start it with --resume, or with drafter.path set to" in warned[0]


def local_learner(folder: Path) -> SimpleNamespace:
    """A learner without sockets, whose training states hold the replay buffer."""
    drafter, wire = day0(), LocalWire()
    log = MetricsLog(folder / "metrics.jsonl", "learner")
    learner = Learner(
        drafter=drafter,
        loss=ImitationLoss(drafter, PARTS.head, steps=3),
        optimizers=drafter_optimizers(drafter, muon_lr=0.02, adam_lr=3e-3),
        buffer=trajectory_buffer(5, 2),
        collector=wire,
        publisher=wire,
        gate=Gate(2, 0.0, SHAPE, drafter.serving_copy(torch.float32)),
        log=log,
        serving_dtype=torch.float32,
        batch_size=2,
        replay=2,
        publish_every=3,
        max_skipped=0,
        states=folder / "learner",
        save_buffer=True,
        outputs=Outputs(log),
    )
    return SimpleNamespace(learner=learner, drafter=drafter, source=wire, folder=folder)


def feed(loop: SimpleNamespace, stream: list[TensorDict]) -> list[int]:
    """Feed a stream; return how many of it the gate held after each."""
    held = []
    for trajectory in stream:
        loop.source.waiting.append(trajectory)
        for _ in range(2):  # less than it could learn, so that something always waits
            loop.learner.step(wait_s=0.0)
        held.append(len(loop.learner._gate._held))
    return held


def decisions(loop: SimpleNamespace) -> list[tuple[bool, float, int]]:
    events = MetricsReader(loop.folder / "metrics.jsonl")
    return [(e["publish"], e["difference"], e["steps"]) for e in events if e["event"] == "gate"]


def test_with_the_buffer_in_the_state_a_continued_run_equals_the_uninterrupted_one_bit_for_bit(
    served: list[TensorDict], tmp_path: Path
) -> None:
    stream = [trajectory.copy() for trajectory in served[:14]]
    for number, trajectory in enumerate(stream):
        trajectory.set_non_tensor("source", f"engine-{number % 2}")
    straight = local_learner(tmp_path / "straight")
    held = feed(straight, stream)
    state = straight.learner.state_dict()
    found = decisions(straight)
    assert len(found) >= 2 and any(publish for publish, _, _ in found)
    waiting = set()
    for cut in (1 + held.index(1), 6, 11):
        part = local_learner(tmp_path / str(cut))
        feed(part, stream[:cut])
        part.learner.save()
        left = {"new": part.learner._new, "replay": part.learner._credit, "held": part.learner._gate._held}
        waiting |= {name for name, value in left.items() if value}
        again = local_learner(tmp_path / str(cut))
        torch.manual_seed(cut)  # as a process that starts
        again.learner.resume(part.folder / "learner")
        feed(again, stream[cut:])
        later = again.learner.state_dict()
        assert same(later["drafter"], state["drafter"]), cut
        assert same(later["serving"], state["serving"]), cut
        for resumed, whole in zip(later["optimizers"], state["optimizers"], strict=True):
            for index, values in resumed["state"].items():
                assert same(as_tensors(values), as_tensors(whole["state"][index])), cut
        assert decisions(again) == found, cut
        sources = [
            [each["notes"]["source"] for each in of["buffer"]["_storage"]["trajectories"]] for of in (later, state)
        ]
        assert sources[0] == sources[1] and set(sources[0]) == {"engine-0", "engine-1"}
    assert waiting == {"new", "replay", "held"}  # what a state must hold was there to be held


def test_a_state_of_a_release_without_shares_of_engines_goes_on(served: list[TensorDict], tmp_path: Path) -> None:
    part = local_learner(tmp_path)
    held = feed(part, served[:4])
    part.learner.save()
    (file,) = (tmp_path / "learner").glob("*/stream.pt")
    stream = torch.load(file, weights_only=True)
    new = [int(each["request"]) for each in part.learner._new]
    assert new and held[-1], "there is nothing to be read"
    storage = stream["buffer"]["_storage"]
    stream["new"] = [storage["trajectories"][place] for place in stream["new"]]
    del storage["recent"], stream["gate"]["recent"]
    torch.save(stream, file)
    (file.parent / "manifest.json").unlink()
    file.parent.rename(tmp_path / "earlier")
    again = local_learner(tmp_path)
    again.learner.resume(tmp_path / "earlier")
    assert [int(each["request"]) for each in again.learner._new] == new
    assert len(again.learner._gate._held) == held[-1]
    before = again.learner.steps
    again.learner._buffer.sample()
    feed(again, served[4:8])
    assert again.learner.steps > before


def test_a_buffer_of_other_objectives_is_refused_before_anything_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = local_learner(tmp_path)
    first.learner.save()
    monkeypatch.setattr(Learner, "_objectives", lambda learner: [])
    with torch.no_grad():
        first.drafter.fc.weight.add_(1)
    before = {name: value.clone() for name, value in first.drafter.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"stream.pt is of a run with 1 objectives, this one has 0; set checkpoint"
    ):
        first.learner.resume(tmp_path / "learner")
    assert same(first.drafter.state_dict(), before)


def test_without_it_no_trajectory_is_saved_and_the_run_goes_on_all_the_same(make: Make, first: SimpleNamespace) -> None:
    newest = states(first.states)[0]
    files = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    drafter = {"drafter/config.json", "drafter/model.safetensors"}
    assert files == {"manifest.json", "model.safetensors", "progress.json"} | drafter
    names = set(load_file(newest / "model.safetensors"))
    assert {name.split(".")[0] for name in names} == {"module", "optimizer", "serving", "replaced", "draft_vocab"}


def test_only_so_many_states_are_kept(make: Make, tmp_path: object) -> None:
    loop = make()
    for _ in range(5):
        loop.learner.save()
    assert [state.name for state in states(loop.states)] == ["000005", "000004", "000003"]

"""An arm on a stream: the acceptance of every request is that of the weights that were served when it came."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tiny_streams import drafter_and_loss, stream
from torch import Tensor

from aurora_rl.adaptation import simulation
from aurora_rl.adaptation.recorded_stream import Parts
from aurora_rl.adaptation.simulation import ArmRun, LocalWire, simulate
from aurora_rl.policies import Eagle3Drafter, TreeShape
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.training.gate import Gate, replay
from aurora_rl.training.learner import Learner
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.replay import trajectory_buffer

SHAPE = TreeShape(3)


def learner_and_drafter(
    folder: Path, wire: LocalWire, margin: float = 9.0, replay: int = 2
) -> tuple[Learner, Eagle3Drafter]:
    torch.manual_seed(0)
    drafter, loss = drafter_and_loss()
    log = MetricsLog(folder / "metrics.jsonl", "learner")
    learner = Learner(
        drafter=drafter,
        loss=loss,
        optimizers=drafter_optimizers(drafter, muon_lr=0.02, adam_lr=5e-3),
        buffer=trajectory_buffer(100, 2),
        collector=wire,
        publisher=wire,
        gate=Gate(2, margin, SHAPE, drafter.serving_copy(torch.float32)),
        log=log,
        serving_dtype=torch.float32,
        batch_size=2,
        replay=replay,
        publish_every=3,
        max_skipped=3,
        states=folder / "learner",
        outputs=Outputs(log),
    )
    return learner, drafter


@pytest.fixture(scope="module")
def requests() -> list[TensorDict]:
    return stream(24)


def test_a_frozen_arm_is_a_replay(requests: list[TensorDict]) -> None:
    drafter, _ = drafter_and_loss()
    run = simulate(requests, drafter.serving_copy(torch.float32), SHAPE)
    expected = replay(drafter.serving_copy(torch.float32), requests, SHAPE)
    assert run.tokens == expected.tokens.tolist() and run.rounds == expected.rounds.tolist()
    assert run.version == [0] * 24 and run.steps == [0] * 24
    assert run.counts.acceptance_length() == pytest.approx(expected.acceptance_length)


def test_a_learning_arm_is_request_by_request_what_was_served(requests: list[TensorDict], tmp_path: Path) -> None:
    wire = LocalWire()
    learner, drafter = learner_and_drafter(tmp_path / "fast", wire)
    kept: dict[int, dict[str, Tensor]] = {}
    told: list[int] = []
    run = simulate(
        requests, drafter.serving_copy(torch.float32), SHAPE, learner=learner, wire=wire, points={10},
        keep=lambda request, weights: kept.update({request: {k: v.clone() for k, v in weights.items()}}),
        tell=lambda done, so_far: told.append(done),
    )  # fmt: skip

    # The slow way: one request after the other, each replayed alone by the weights of that moment.
    wire = LocalWire()
    learner, drafter = learner_and_drafter(tmp_path / "slow", wire)
    serving, slow, version = drafter.serving_copy(torch.float32), ArmRun(), 0
    for request, trajectory in enumerate(requests, 1):
        replayed = replay(serving, [trajectory], SHAPE)
        slow.tokens += replayed.tokens.tolist()
        slow.rounds += replayed.rounds.tolist()
        slow.version.append(version)
        wire.waiting.append(trajectory)
        while learner.step(wait_s=0.0):
            pass
        slow.steps.append(learner.steps)
        if wire.newest is not None:
            version, weights = wire.newest
            wire.newest = None
            serving.install(weights)
        if request == 10:
            for name, tensor in serving.published().items():
                assert torch.equal(tensor, kept[10][name]), name
    assert run == slow
    assert run.version[-1] >= 3 and run.steps[-1] > 24
    assert told[-1] == 24 and list(kept) == [10]
    frozen = simulate(requests, drafter_and_loss()[0].serving_copy(torch.float32), SHAPE)
    assert run.rounds != frozen.rounds  # what it learned was served


def test_a_gate_that_lets_nothing_pass_leaves_the_arm_as_it_is(requests: list[TensorDict], tmp_path: Path) -> None:
    wire = LocalWire()
    learner, drafter = learner_and_drafter(tmp_path, wire, margin=-9.0)
    serving = drafter.serving_copy(torch.float32)
    run = simulate(requests, serving, SHAPE, learner=learner, wire=wire)
    frozen = simulate(requests, drafter_and_loss()[0].serving_copy(torch.float32), SHAPE)
    assert set(run.version) == {0} and run.steps[-1] > 0
    assert run.rounds == frozen.rounds


def test_a_learner_takes_the_steps_that_its_pace_allows(requests: list[TensorDict], tmp_path: Path) -> None:
    wire = LocalWire()
    learner, drafter = learner_and_drafter(tmp_path, wire, replay=100)
    serving = drafter.serving_copy(torch.float32)
    run = simulate(requests, serving, SHAPE, learner=learner, wire=wire, pace=1.5)
    # The first batch is of two requests, and time before it is lost; after it replay fills all time.
    assert run.steps[:5] == [0, 1, 3, 4, 6]
    assert run.steps[-1] == run.steps[1] + 33


@pytest.mark.parametrize("pace", [float("inf"), 1.5])
def test_an_interrupted_arm_goes_on_as_if_it_had_not_been(
    requests: list[TensorDict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pace: float
) -> None:
    monkeypatch.setattr(simulation, "_SAVED_EVERY", 5)
    kept: list[bytes] = []

    def arm(folder: str, stop_after: int | None, state: dict[str, Any] | None = None) -> tuple[ArmRun, Eagle3Drafter]:
        wire = LocalWire()
        learner, drafter = learner_and_drafter(tmp_path / folder, wire)

        def save(so_far: dict[str, Any]) -> None:
            file = io.BytesIO()
            torch.save(so_far, file)
            kept.append(file.getvalue())

        def tell(done: int, run: ArmRun) -> None:
            if stop_after is not None and done >= stop_after:
                raise KeyboardInterrupt

        run = simulate(
            requests, drafter.serving_copy(torch.float32), TreeShape(3, 2, 3, lookup=3), learner=learner, wire=wire,
            earlier=EarlierAnswers(60), pace=pace, num_slots=2, tell=tell, save=save, state=state,
        )  # fmt: skip
        return run, drafter

    whole, learned = arm("whole", None)
    assert whole.version[-1] >= 3
    kept.clear()
    with pytest.raises(KeyboardInterrupt):
        arm("first", 18)
    state = torch.load(io.BytesIO(kept[-1]), weights_only=True)
    assert 10 <= len(state["run"]["tokens"]) < 18 and len(kept) >= 2
    torch.manual_seed(99)
    rest, relearned = arm("rest", None, state)
    assert rest == whole
    for name, tensor in learned.state_dict().items():
        assert torch.equal(relearned.state_dict()[name], tensor), name


@pytest.mark.parametrize("by_part", [True, False])
def test_parts_of_requests_are_learned_from_at_once_or_when_all_of_a_request_is_there(
    requests: list[TensorDict], tmp_path: Path, by_part: bool
) -> None:
    wire, parts, lessons = LocalWire(), Parts(requests, 2), []
    learner, drafter = learner_and_drafter(tmp_path, wire)
    poll = wire.poll

    def noting(timeout_s: float = 0.0) -> list[TensorDict]:
        taken = poll(timeout_s)
        lessons.extend((int(t["request"]), int(t["sequence", "prompt_length"])) for t in taken)
        return taken

    wire.poll = noting  # type: ignore[method-assign]
    earlier = EarlierAnswers(60)
    run = simulate(
        parts, drafter.serving_copy(torch.float32), SHAPE, learner=learner, wire=wire, earlier=earlier,
        by_part=by_part, num_slots=1,
    )  # fmt: skip
    starts = [(int(part["request"]), int(part["sequence", "prompt_length"])) for part in parts]
    assert len(starts) > 24
    assert lessons == (
        starts if by_part else [start for start, p in zip(starts, parts.positions, strict=True) if p == 0]
    )
    assert len(run.tokens) == len(run.version) == len(run.steps) == len(parts)
    # Lookup has whole answers, however they were cut.
    expected = EarlierAnswers(60)
    for trajectory in requests:
        expected.add(trajectory["sequence", "tokens"][int(trajectory["sequence", "prompt_length"]) :].numpy())
    assert vars(earlier).keys() == vars(expected).keys()
    for key, value in vars(expected).items():
        assert repr(vars(earlier)[key]) == repr(value), key

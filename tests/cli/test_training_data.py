"""Recordings to learn from: what the target is asked, which prompts are read, and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from tiny_drafters import drafter_for

from aurora_rl.cli import assembly, spec
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.training_data import open_recording, questions, recorded_prompts, recording_names
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.policies import Eagle3Drafter, MedusaDrafter, TargetParts
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import rule_code
from aurora_rl.workload.traffic import Prompt


def chat(*roles: str) -> tuple[dict[str, str], ...]:
    return tuple({"role": role, "content": f"{role} {place}"} for place, role in enumerate(roles))


def test_a_chat_is_asked_without_its_last_answer() -> None:
    whole = chat("system", "user", "assistant", "user", "assistant", "assistant")
    prompt = Prompt("a", "code", whole, ("And then?",), max_tokens=3, stop=("END",), sampling={"seed": 5})
    asked, kept = questions([prompt, Prompt("b", "", chat("user"))])
    assert asked == Prompt("a", "code", whole[:4], max_tokens=3, sampling={"seed": 5})
    assert kept == Prompt("b", "", chat("user"))


def test_chats_that_nobody_may_learn_from_are_left_out() -> None:
    open_chat, closed = Prompt("a", "", chat("user")), Prompt("b", "", chat("assistant"), learn=False)
    assert questions([closed, open_chat, closed]) == [open_chat]
    with pytest.raises(ConfigError, match="^traffic.path: all 2 chats say learn=false; train on chats that do not"):
        questions([closed, closed])


def test_a_chat_of_answers_alone_is_named() -> None:
    with pytest.raises(ConfigError, match="^traffic.path: chat 'b' has answers only; put a question before them$"):
        questions([Prompt("a", "", chat("user")), Prompt("b", "", chat("assistant", "assistant"))])


def record(folder: Path, *prompts: list[int]) -> Path:
    recording = TrajectoryDataset(folder, ())
    for tokens in prompts:
        sequence = {"tokens": torch.tensor([*tokens, 90, 91]), "prompt_length": torch.tensor(len(tokens))}
        recording.append(TensorDict({"sequence": sequence}))
    return folder


def test_prompts_come_from_every_recording(tmp_path: Path) -> None:
    folders = [record(tmp_path / "a", [1], [2, 2], [3]), record(tmp_path / "b", [4, 5])]
    assert recorded_prompts(folders, 4) == [[1], [2, 2], [4, 5]]  # two of each, and the second has one
    assert recorded_prompts(folders, 3) == [[1], [2, 2], [4, 5]]
    assert recorded_prompts(folders[:1], 1) == [[1]]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=f"--recording {tmp_path}/empty holds no trajectories; learner.recording="):
        recorded_prompts([folders[0], tmp_path / "empty"], 4)


def test_a_recording_of_another_target_is_refused(config: Config, tmp_path: Path) -> None:
    run = spec.resolve(config)
    target = assembly.load(run)  # of hidden size 32
    medusa = drafter_for(MedusaDrafter, tiny_target())  # of hidden size 16
    TrajectoryDataset(tmp_path / "tiny", medusa.feature_layers).append(tiny_trajectory(medusa))
    drafter = assembly.start_drafter(run, target, [])
    drafter.feature_layers = medusa.feature_layers
    with pytest.raises(ConfigError, match=f"^--recording {tmp_path}/tiny: .*features"):
        open_recording(tmp_path / "tiny", target, drafter)
    drafter.feature_layers = (0, 1)
    with pytest.raises(ConfigError, match=f"^--recording {tmp_path}/tiny: .*this one reads 0,1"):
        open_recording(tmp_path / "tiny", target, drafter)


def test_a_recording_with_a_request_that_cannot_be_replayed_is_refused(config: Config, tmp_path: Path) -> None:
    model = tiny_target()
    target = replace(assembly.load(spec.resolve(config)), model=model, parts=TargetParts.of(model))
    drafter = drafter_for(Eagle3Drafter, model)
    recording = TrajectoryDataset(tmp_path / "mixed", drafter.feature_layers)
    recording.append(tiny_trajectory(drafter))
    assert len(open_recording(recording.folder, target, drafter)) == 1
    recording.append(tiny_trajectory(drafter).set(("sampling", "rule"), torch.tensor(rule_code("rejection"))))
    with pytest.raises(ConfigError, match=f"^--recording {tmp_path}/mixed: the rule 'rejection' is not replayable: "):
        open_recording(recording.folder, target, drafter)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["/a/code", "/b/math"], ["code", "math"]),
        (["/t1/recording", "/t2/recording"], ["t1", "t2"]),
        (["/t1/x/recording", "/t2/x/recording"], ["t1", "t2"]),
        (["/t1/recording", "/t2/recording", "/t2/math"], ["t1/recording", "t2/recording", "t2/math"]),
        (["/t1/recording", "/t1/recording"], ["recording", "recording"]),
    ],
)
def test_recordings_are_named_by_what_tells_them_apart(folders: list[str], names: list[str]) -> None:
    assert recording_names([Path(folder) for folder in folders]) == names

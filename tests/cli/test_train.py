"""`aurora-rl train`: recorded, learned, evaluated on held-out requests, interrupted and resumed."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from run_events import summary
from safetensors.torch import load_file
from torch import Tensor
from trainings import chats, train, training_pairs

from aurora_rl.cli import main as cli
from aurora_rl.cli import train as train_command
from aurora_rl.cli.assembly import load, request_queue, start_drafter, traffic
from aurora_rl.cli.config import load_config
from aurora_rl.cli.spec import resolve
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import SampleAndMatch, TransformersEngine
from aurora_rl.envs.verification.rules import rule_of_code
from aurora_rl.policies import Eagle3Drafter
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.telemetry.log import MetricsReader
from aurora_rl.training.offline import OfflineTrainer
from aurora_rl.trajectories import RULE_CODES, rule_code

FILES = {
    "config.yaml",
    "train.json",
    "drafter-day0",
    "recording",
    "learner",
    "drafter",
    "metrics.jsonl",
    "summary.json",
}


@pytest.fixture
def pairs(tiny_folder: Path) -> list[str]:
    return training_pairs(tiny_folder)


# ---- from chats -----------------------------------------------------------------------------------------------------


def test_traffic_is_recorded_and_learned_and_the_result_is_served(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "first run"
    assert train("--held-out", "0.3", "--epochs", "2", *pairs, f"run_dir={run}", "telemetry.logger=csv") == 0
    out = capsys.readouterr()
    assert out.err == "" and "epoch 0: acceptance length" in out.out and "epoch 2: acceptance length" in out.out
    assert {path.name for path in run.iterdir()} == FILES | {"logs"}
    logged = (run / "logs" / "first run" / "scalars" / "train" / "loss.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in logged] == [1, 2, 3, 4]
    assert len(TrajectoryDataset(run / "recording")) == 6
    figures = summary(run)
    assert (figures["requests"], figures["held_out"], figures["steps"], figures["skipped"]) == (4, 2, 4, 0)
    lengths = [e for e in MetricsReader(run / "metrics.jsonl") if e["event"] == "evaluation"]
    assert figures["acceptance_length"]["first"] == round(lengths[0]["acceptance_length"], 4)
    assert figures["acceptance_length"]["last"] == round(max(length["acceptance_length"] for length in lengths), 4)
    assert len(lengths) == 3 and sum(d["requests"] for d in figures["domains"].values()) == 2
    assert set(figures["domains"]) <= {"code", "sql", "math", "finance", "chat"}
    losses = [e["loss"] for e in MetricsReader(run / "metrics.jsonl") if e["event"] == "train"]
    assert len(losses) == 4 and losses[-1] < losses[0]
    (serve,) = (shlex.split(line) for line in out.out.splitlines() if line.startswith("aurora-rl serve "))
    served = [
        "flywheel",
        *serve[2:],
        "learner.spawn=false",
        "drafter.adaptive=false",
        "traffic.requests=2",
        "http.port=null",
        f"run_dir={tmp_path / 'served'}",
    ]
    assert cli.main(served) == 0
    assert summary(tmp_path / "served")["requests"] == 2


def test_built_in_traffic_is_learned_from_if_it_is_asked_for_alone(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*(pair for pair in pairs if not pair.startswith("traffic.")), f"run_dir={tmp_path / 'run'}"]
    assert train(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "traffic.path=FILE.jsonl" in line and "--recording FOLDER" in line and not (tmp_path / "run").exists()


def test_the_target_answers_itself_what_chats_end_with_an_answer_to(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = chats(
        tmp_path / "chats.jsonl",
        [("user", "one")],
        [("user", "two"), ("assistant", "an answer that nobody reads")],
        [("user", "three"), ("assistant", "kept"), ("user", "four")],
    )
    run = tmp_path / "run"
    assert train("--epochs", "1", *pairs, path, f"run_dir={run}", "learner.batch_size=1") == 0
    (serve,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("aurora-rl serve "))
    assert serve.endswith(" traffic.path=null")  # the chats would be read in vain, and the server would say so
    tokenizer = load(resolve(load_config(overrides=pairs))).tokenizer
    prompts = set()
    for trajectory in TrajectoryDataset(run / "recording"):
        prompts.add(tokenizer.decode(trajectory["sequence", "tokens"][: int(trajectory["sequence", "prompt_length"])]))
    assert prompts == {
        "<user>one<assistant>",
        "<user>two<assistant>",
        "<user>three<assistant>kept<user>four<assistant>",
    }
    assert summary(run)["domains"] == {}


class CountingEngine(TransformersEngine):
    """An engine of a third party."""

    passes = 0

    def verify(self, *round_: Any) -> Tensor:
        CountingEngine.passes += 1
        return super().verify(*round_)


class OwnRule(SampleAndMatch):  # type: ignore[misc]  # a third party may derive where the library does not
    """A verification rule of a third party."""


def test_answers_are_recorded_by_the_engine_and_the_rule_that_are_configured(pairs: list[str], tmp_path: Path) -> None:
    CountingEngine.passes, run, rule = 0, tmp_path / "run", f"{__name__}:OwnRule"
    own = [f"engine.name={__name__}:CountingEngine", f"rule={rule}"]
    assert train("--epochs", "1", *pairs, *own, f"run_dir={run}") == 0
    assert CountingEngine.passes > 6
    (code,) = set(TrajectoryDataset(run / "recording").numbers("sampling.rule"))
    assert rule_of_code(code) is OwnRule and code >= len(RULE_CODES)


def test_a_server_of_its_own_records_no_answers(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*pairs, "engine.name=sglang", f"run_dir={tmp_path / 'run'}") == 2
    assert capsys.readouterr().err == (
        "aurora-rl: engine.name=sglang is a server of its own, and this command runs the engine in this process; set "
        "engine.name=transformers\n"
    )
    assert not (tmp_path / "run").exists()


# ---- from recordings ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recordings(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two recordings of different length."""
    spec = resolve(load_config(overrides=training_pairs(tiny_folder)))
    target, folders = load(spec), []
    drafter = start_drafter(spec, target, [])
    requests = request_queue(spec, target, traffic(spec.config))
    waiting = list(iter(requests, None))
    for name, part in (("code", waiting[:4]), ("all", waiting[4:])):
        folders.append(tmp_path_factory.mktemp("recordings") / name)
        recording = TrajectoryDataset(folders[-1], drafter.feature_layers)
        record_requests(target.model, drafter, part, recording, shape=spec.tree)
    return folders


def test_one_held_out_request_is_one(
    pairs: list[str], recordings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--recording", str(recordings[0]), "--held-out", "0.25", "--epochs", "1"]
    assert train(*words, *pairs, f"run_dir={tmp_path / 'run'}") == 0
    assert " on 1 held-out request\n" in capsys.readouterr().out


def test_recordings_are_learned_together_and_each_is_held_out_in_part(
    pairs: list[str], recordings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    folders = [word for folder in recordings for word in ("--recording", str(folder))]
    words = [*folders, "--held-out", "0.25", "--epochs", "1"]
    assert train(*words, *pairs, f"run_dir={run}") == 0
    figures = summary(run)
    assert figures["requests"] == 4  # 4 - 1 and 2 - 1
    assert {name: domain["requests"] for name, domain in figures["domains"].items()} == {"code": 1, "all": 1}
    events = [event for event in MetricsReader(run / "metrics.jsonl") if event["event"] == "evaluation"]
    for place, event in (("first", events[0]), ("last", max(events, key=lambda event: event["acceptance_length"]))):
        lengths = event["domains"]
        assert lengths.keys() == {"all", "code"} and min(lengths.values()) < event["acceptance_length"]
        assert event["acceptance_length"] < max(lengths.values())
        assert figures["acceptance_length"][place] == round(event["acceptance_length"], 4)
        assert figures["domains"]["all"]["acceptance_length"][place] == round(lengths["all"], 4)
    assert not (run / "recording").exists()
    capsys.readouterr()
    assert train("--resume", str(run), "--recording", str(recordings[0])) == 2
    named = " ".join(f"--recording {folder}" for folder in recordings)
    assert f"started with {named}, which stays; leave the option out" in capsys.readouterr().err
    assert train(*words, "--recording", f"{recordings[0]}/../code", *pairs) == 2
    assert "name each recording once" in capsys.readouterr().err
    assert train("--resume", str(run), "--held-out", "0.5") == 2
    assert "it was started with --held-out 0.25, which stays" in capsys.readouterr().err
    moved = json.loads((run / "train.json").read_text())
    (run / "train.json").write_text(json.dumps(moved | {"recording": moved["recording"][::-1]}))
    assert train("--resume", str(run)) == 2
    assert f"--recording {recordings[1]} --recording {recordings[0]}) was changed or" in capsys.readouterr().err
    (run / "train.json").write_text(json.dumps(moved))
    path = run / "learner" / "progress.json"
    path.write_text(path.read_text().replace("4,", "9,", 1))
    assert train("--resume", str(run)) == 2
    assert "it was started on [9, 2] requests (to learn from, held out), and there are [4, 2] now" in (
        capsys.readouterr().err
    )


# ---- what cannot be written -----------------------------------------------------------------------------------------


def test_a_save_that_fails_ends_no_training(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, save, calls = tmp_path / "run", OfflineTrainer.save, itertools.count(1)

    def full_at_the_second(trainer: OfflineTrainer, *args: Any, **progress: Any) -> None:
        if next(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(trainer, *args, **progress)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(OfflineTrainer, "save", full_at_the_second)
    monkeypatch.setattr(train_command, "write_summary", full)
    assert train("--epochs", "3", *pairs, f"run_dir={run}") == 1
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("aurora-rl: ")] == [
        "aurora-rl: summary.json could not be written: No space left on device",  # the learner was written in the end
    ]
    assert {path.name for path in run.iterdir()} == FILES - {"summary.json"}
    assert json.loads((run / "learner" / "progress.json").read_text())["batches"] == 6
    assert sum(event["event"] == "not_written" for event in MetricsReader(run / "metrics.jsonl")) == 2


def test_the_best_drafter_is_the_one_that_was_written(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    run, save = tmp_path / "run", Eagle3Drafter.save_pretrained
    monkeypatch.setattr(
        Eagle3Drafter, "save_pretrained", lambda self, to: full() if to == run / "drafter" else save(self, to)
    )
    assert train("--epochs", "1", *pairs, f"run_dir={run}") == 1
    assert "aurora-rl: drafter could not be written (2 times): No space left on device" in capsys.readouterr().err
    lengths = summary(run)["acceptance_length"]
    assert lengths["first"] == lengths["last"] and not (run / "drafter").exists()


def test_lines_that_the_log_lost_are_counted(
    pairs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = os.write
    lost = b'"event": "train"'
    monkeypatch.setattr(os, "write", lambda file, line: 0 if lost in line else write(file, line))
    assert train("--epochs", "1", *pairs, f"run_dir={tmp_path / 'run'}") == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"aurora-rl: {tmp_path / 'run' / 'metrics.jsonl'} lacks 2 lines that could not be written"
    )


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--epochs", "0"], "--epochs must be at least 1, got 0"),
        (["--held-out", "1.5"], "--held-out must lie between 0 and 1, got 1.5"),
        (["--resume", "NOWHERE", "run_dir=null"], "there is no config.yaml in it"),
        (["--resume", "SERVED", "run_dir=null"], "there is no train.json in it; it is no training's folder"),
        (["--resume", "BROKEN", "run_dir=null"], "train.json is broken: Expecting value"),
        (
            ["--resume", "BROKEN:{'epochs': 'two'}", "run_dir=null"],
            "train.json: epochs must be an integer, got 'two'",
        ),
        (["--resume", "BROKEN:{'held_out': []}", "run_dir=null"], "train.json: held_out must be a number, got []"),
        (["--resume", "BROKEN:{'recording': 'x'}", "run_dir=null"], "recording must be a list or null, got 'x'"),
        (["--resume", "BROKEN:{'recording': [3]}", "run_dir=null"], "train.json is broken: "),
        (["--recording", "EMPTY"], "holds no trajectories; learner.recording="),
        (["drafter.name=ngram", "drafter.feature_layers=null"], "has no weights to learn"),
        (["learner.batch_size=10"], "learner.batch_size=10 is more than the 5 requests that are left to learn from"),
        (
            ["traffic.requests=1"],
            "learner.batch_size=2 is more than the 0 requests that are left to learn from: of 1, --held-out keeps 1 to "
            "evaluate on; give more requests",
        ),
        (
            ["--recording", "EMPTY", "traffic.path=ANSWERS"],
            "answers.jsonl next to --recording: a training learns from recordings or from chats; leave one of them out",
        ),
        (["traffic.path=ANSWERS"], "chat 'line-1' has answers only; put a question before them"),
    ],
)
def test_what_cannot_be_learned_is_refused_by_one_line(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], wrong: str
) -> None:
    chats(tmp_path / "answers.jsonl", [("assistant", "yes")])
    (tmp_path / "empty").mkdir()
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "config.yaml").write_text("drafter: {name: eagle3}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("drafter: {name: eagle3}")
    written = next((word.partition(":")[2] for word in words if word.startswith("BROKEN")), "")
    (tmp_path / "broken" / "train.json").write_text(written.replace("'", '"'))
    names = {"NOWHERE": str(tmp_path / "nowhere"), "SERVED": str(tmp_path / "served")}
    places = names | {
        "BROKEN": str(tmp_path / "broken"),
        "EMPTY": str(tmp_path / "empty"),
        "ANSWERS": str(tmp_path / "answers.jsonl"),
    }
    for name, place in places.items():
        words = [word.partition(":{")[0].replace(name, place) for word in words]
    assert train(*pairs, f"run_dir={tmp_path / 'run'}", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert wrong in line


def test_a_request_that_the_rule_does_not_serve_leaves_no_folder(
    pairs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0.7}
    (tmp_path / "chats.jsonl").write_text((json.dumps(line) + "\n") * 12)
    where = [f"traffic.path={tmp_path / 'chats.jsonl'}", f"run_dir={tmp_path / 'run'}"]
    assert train(*pairs, "rule=greedy", *where) == 2
    assert "greedy" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_a_recording_of_another_drafter_is_refused_and_leaves_no_folder(
    pairs: list[str], recordings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mismatched = [*pairs, "drafter.feature_layers=[0,1]", f"run_dir={tmp_path / 'run'}"]
    assert train("--recording", str(recordings[0]), *mismatched) == 2
    assert "was recorded for a drafter that reads layers 1,2, this one reads 0,1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_recording_of_an_unknown_rule_is_refused_and_leaves_no_folder(
    pairs: list[str], recordings: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = TrajectoryDataset(tmp_path / "foreign")
    for trajectory in TrajectoryDataset(recordings[0]):
        foreign.append(trajectory.set(("sampling", "rule"), torch.tensor(rule_code("absent_rules:Absent"))))
    assert train("--recording", str(tmp_path / "foreign"), *pairs, f"run_dir={tmp_path / 'run'}") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aurora-rl: --recording {tmp_path / 'foreign'}: the verification rule of code ")
    assert "is not known here; set rule to that of the engine" in line and not (tmp_path / "run").exists()


def test_a_start_from_a_checkpoint_learns_on(pairs: list[str], recordings: list[Path], tmp_path: Path) -> None:
    config = load_config(overrides=pairs)
    spec = resolve(config)
    drafter = start_drafter(spec, load(spec), [])
    drafter.save_pretrained(tmp_path / "mine")
    run = tmp_path / "run"
    pairs = [*pairs, f"drafter.path={tmp_path / 'mine'}", f"run_dir={run}"]
    assert train("--recording", str(recordings[0]), "--epochs", "1", *pairs) == 0
    mine, day0, learned = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "mine", run / "drafter-day0", run / "learner")
    )
    assert all(torch.equal(mine[name], tensor) for name, tensor in day0.items())
    assert not torch.equal(learned["module.fc.weight"], mine["fc.weight"])

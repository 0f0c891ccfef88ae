"""`aurora-rl flywheel` and `serve`: the whole loop, what it writes, what is printed, and how it ends."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from forked_commands import Forks
from run_events import events, summary
from transformers import AutoTokenizer

from aurora_rl.cli import assembly, serve
from aurora_rl.cli import main as cli
from aurora_rl.cli.config import load_config
from aurora_rl.cli.learner_process import LearnerProcess
from aurora_rl.envs import Completion
from aurora_rl.policies import MedusaDrafter, NgramDrafter
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.stats import Stats

FILES = {"config.yaml", "metrics.jsonl", "report.png", "summary.json"}
ALONE = ["flywheel", "learner.spawn=false"]
QUICK = ["drafter.adaptive=false", "traffic.requests=6"]  # rounds are not measured before serving
SERVED = FILES | {"answers.jsonl", "drafter"}

PLAIN = """
from aurora_rl.objectives import register_objective
@register_objective("plain")
def plain(log_p, log_q, windows):
    return -(log_p.exp() * log_q).sum(-1), windows.valid
"""


# ---- the whole loop -------------------------------------------------------------------------------------------------


def test_the_flywheel_serves_learns_and_swaps(arguments: list[str], tmp_path: Path) -> None:
    # By the installed command, in a folder with a part by its import path, and files that must not shadow modules.
    (tmp_path / "here" / "aurora_rl").mkdir(parents=True)
    (tmp_path / "here" / "my_file.py").write_text(PLAIN)
    for name in ("profile.py", "aurora_rl/__init__.py"):
        (tmp_path / "here" / name).write_text("raise SystemExit('shadowed')")
    pairs = [
        "objectives=[{name: my_file:plain}]",
        *(
            "traffic.requests=96",
            "learner.publish_every=4",
            "learner.batch_size=4",
            "gate.requests=3",
            "learner.replay=1",
        ),
        *("gate.margin=9", "baseline.share=0.3", "baseline.window=6", "drafter.adaptive=false"),
    ]
    installed = [sys.executable, "-P", "-c", "from aurora_rl.cli.main import program; program()"]
    command = [*installed, "flywheel", *arguments, *pairs]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path / "here")
    run = tmp_path / "run"
    log = (run / "learner.log").read_text() if run.exists() else ""
    assert done.returncode == 0 and "shadowed" not in done.stderr + log, done.stderr + log
    assert done.stderr == ""
    assert "96 (0 failed)" in done.stdout

    figures = summary(run)
    assert list(figures) == list(Stats().summary())
    assert (figures["requests"], figures["failed"], figures["dropped_trajectories"]) == (96, 0, 0)
    assert figures["swaps"] >= 1
    assert len(figures["versions_served"]) == figures["swaps"] + 1
    assert figures["versions_served"] == sorted(set(figures["versions_served"]))
    assert figures["versions_served"][0] == 0
    assert 0 < figures["swap_ms"]["p50"] <= figures["swap_ms"]["max"]
    assert 1 <= figures["acceptance_length"]["first"] <= 5
    assert 1 <= figures["acceptance_length"]["last"] <= 5
    rates = figures["tokens_per_second"]
    assert rates["speculative"] > 0
    if figures["speedup"] is not None:
        assert figures["speedup"] == pytest.approx(rates["speculative"] / rates["baseline"], rel=1e-3)
    assert 1 < figures["duration_s"] < 120

    learned = {"drafter-day0", "learner", "learner.log", "learner.yaml", "versions"}
    assert {path.name for path in run.iterdir()} == SERVED | learned
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {path.name for path in (run / "drafter").iterdir()} == {"config.json", "model.safetensors"}
    again = load_config(run / "config.yaml")
    # The saved configuration starts another run, in a folder of its own.
    assert again == replace(load_config(overrides=[*arguments, *pairs, "canary.share=0"]), run_dir=None)
    assert not any("run_dir" in (run / name).read_text() for name in ("config.yaml", "learner.yaml"))

    (ready,) = events(run, "learner_ready")
    assert not Path(f"/proc/{ready['pid']}").exists()
    requests = events(run, "request")
    assert sorted(event["request"] for event in requests) == list(range(96))
    assert {version for event in requests for version in event["versions"]} <= set(figures["versions_served"])
    assert all(0 <= event["coverage"] <= 1 for event in requests)
    gates, swaps = events(run, "gate"), events(run, "swap")
    assert {event["version"] for event in swaps} <= {event["version"] for event in gates if event["publish"]}
    status = events(run, "status")[-1]
    assert (status["requests"], status["dropped"]) == (96, {})
    assert status["version"] == figures["versions_served"][-1]
    assert status["learner"] == "running"
    (over,) = events(run, "learner_done")
    assert over["seen"] > 0 and events(run, "train")
    assert "Warning" not in log


def test_a_drafter_that_fails_before_serving_starts_leaves_plain_serving(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no ideas at all")

    monkeypatch.setattr(NgramDrafter, "propose", fails)
    assert cli.main([*ALONE, *arguments, "drafter.name=ngram"]) == 0
    run = tmp_path / "run"
    (fault,) = events(run, "drafter_fault")
    assert fault["request"] is None and "NgramDrafter failed: RuntimeError('no ideas at all')" in fault["fault"]
    assert "every request is served without the drafter: NgramDrafter failed" in caplog.text
    assert (summary(run)["requests"], summary(run)["failed"], summary(run)["drafter_faults"]) == (6, 0, 1)
    assert {event["speculative_rounds"] for event in events(run, "request")} == {0}


def test_n_grams_go_on_without_a_learned_half_that_fails_before_serving_starts(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: object) -> None:
        raise RuntimeError("no ideas at all")

    monkeypatch.setattr(MedusaDrafter, "propose", fails)
    assert cli.main([*ALONE, *arguments]) == 0
    run = tmp_path / "run"
    (fault,) = events(run, "drafter_fault")
    assert fault["request"] is None and "no ideas at all" in fault["fault"]
    assert (summary(run)["requests"], summary(run)["failed"], summary(run)["drafter_faults"]) == (6, 0, 1)
    assert any(event["accepted"] for event in events(run, "request"))  # rounds by accepted drafts, where there were any


def test_serving_needs_no_learner(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments.remove("engine.max_length=256")
    assert cli.main([*ALONE, *arguments]) == 0
    figures = summary(tmp_path / "run")
    assert (figures["requests"], figures["swaps"], figures["versions_served"]) == (6, 0, [0])
    assert figures["dropped_trajectories"] == 6
    status = events(tmp_path / "run", "status")[-1]
    assert (status["queue"], status["learner"]) == (6, f"any at {load_config(overrides=arguments).wire.weights}")
    out = capsys.readouterr().out
    assert "written to" in out and "engine.max_length=512, the context of" in out
    assert {path.name for path in (tmp_path / "run").iterdir()} == SERVED


# ---- what is written, and what cannot be ----------------------------------------------------------------------------


def test_every_completed_request_is_answered_in_a_file(
    arguments: list[str], tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        {"id": "a", "domain": "greetings", "messages": [{"role": "user", "content": "Hi"}], "follow_ups": ["And?"]},
        {"id": "b", "messages": [{"role": "user", "content": "Count"}]},
    ]
    (tmp_path / "traffic.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    completions, completed = {}, InferenceServer.completed

    def noted(server: InferenceServer, completion: Completion) -> None:
        completions[completion.request.id] = completion
        completed(server, completion)

    monkeypatch.setattr(InferenceServer, "completed", noted)
    assert cli.main([*ALONE, *arguments, *QUICK, f"traffic.path={tmp_path / 'traffic.jsonl'}"]) == 0
    answers = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert sorted((a["prompt"], a["turn"]) for a in answers) == [("a", 1), ("a", 2), ("b", 1)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    for answer in answers:
        completion = completions[answer["request"]]
        assert answer == {
            "request": answer["request"],
            "prompt": answer["prompt"],
            "domain": answer["domain"],
            "turn": answer["turn"],
            "text": tokenizer.decode(completion.tokens, skip_special_tokens=True),
            "finish_reason": "stop" if completion.terminated else "length",
            "tokens": len(completion.tokens),
        }
    assert {a["domain"] for a in answers if a["prompt"] == "a"} == {"greetings"}
    assert {(a["finish_reason"], a["tokens"]) for a in answers} >= {("length", 8)}


def test_an_output_that_fails_does_not_lose_the_others(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aurora_rl.serving.server.save_drafter", full)
    monkeypatch.setattr(serve, "write_summary", full)
    assert cli.main([*ALONE, *arguments, *QUICK]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "aurora-rl: drafter could not be written: No space left on device",
        "aurora-rl: summary.json could not be written: No space left on device",
    ]
    assert {path.name for path in (tmp_path / "run").iterdir()} == SERVED - {"drafter", "summary.json"}


def test_a_full_disk_at_the_end_of_serving_is_told_and_nothing_half_written_is_left(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_summary = Stats.summary
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_then_summary(stats: Stats, **figures: Any) -> dict[str, Any]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        return real_summary(stats, **figures)

    monkeypatch.setattr(Stats, "summary", full_then_summary)
    try:
        assert cli.main([*ALONE, *arguments, *QUICK]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    errors = capsys.readouterr().err
    assert f"{tmp_path / 'run' / 'drafter'} cannot be written" in errors and "report.png could not be" in errors
    assert summary(tmp_path / "run")["requests"] == 6
    assert {path.name for path in (tmp_path / "run").iterdir()} == SERVED - {"drafter", "report.png"}


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_a_run_that_the_engine_refuses_leaves_no_folder(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "refusing_engine.py").write_text(
        "from aurora_rl.envs import TransformersEngine\n"
        "class Refusing(TransformersEngine):\n"
        "    def __init__(self, *args, **kwargs):\n        raise ValueError('no such model here')\n"
    )
    monkeypatch.chdir(tmp_path / "here")
    learners: list[LearnerProcess] = []
    withdraw = LearnerProcess.withdraw
    monkeypatch.setattr(LearnerProcess, "withdraw", lambda self: (learners.append(self), withdraw(self)))
    assert cli.main(["flywheel", *arguments, *QUICK, "engine.name=refusing_engine:Refusing"]) == 2
    assert capsys.readouterr().err == "aurora-rl: no such model here\n"
    assert learners[0].child.poll() is not None and not (tmp_path / "run").exists()


# ---- what is printed, and where -------------------------------------------------------------------------------------


def test_names_and_peers_texts_are_shown_as_they_are(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refused = "handshake mismatch: target is [/x] :x: [bold]"
    monkeypatch.setattr(InferenceServer, "refused", property(lambda self: refused))
    monkeypatch.setattr(serve, "every", lambda seconds, action: action)
    run = tmp_path / "[fp16]" / "[/b]"
    assert cli.main([*ALONE, *arguments, *QUICK, f"run_dir={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"run folder {run}")  # on one line, however long
    assert refused in lines
    status = [line for line in lines if line.startswith("requests ")]
    assert status and all(f"learner {refused} |" in line and "gate" in line for line in status)


def test_an_output_without_the_characters_gets_plain_ones(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    assert cli.main([*ALONE, *arguments, *QUICK]) == 0
    text = raw.getvalue().decode("ascii")
    assert "acceptance length, first -> last tenth" in text
    assert "6 (0 failed)" in text


def test_serving_goes_on_when_the_reader_of_its_output_is_gone(
    arguments: list[str], tmp_path: Path, forks: Forks
) -> None:
    reader, output = os.pipe()
    with open(reader, "rb") as lines, open(tmp_path / "errors", "wb") as errors:
        process = forks.start([*ALONE, *arguments, *QUICK], output, errors)
        os.close(output)
        assert lines.readline().startswith(b"loading")
        lines.close()
        assert (process.wait(60), (tmp_path / "errors").read_text()) == (0, "")
    assert summary(tmp_path / "run")["requests"] == 6


def test_serving_goes_on_where_its_outputs_were_closed_before_it_began(arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "aurora_rl.cli.main", *ALONE, *arguments, *QUICK]
    assert subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], timeout=60).returncode == 0
    assert summary(tmp_path / "run")["requests"] == 6
    assert {path.name for path in (tmp_path / "run").iterdir()} == SERVED


# ---- interrupted, and stopped by an error ---------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "name"), [(serve, "Outputs"), (assembly, "load")])  # the first begins the folder
def test_ctrl_c_while_starting(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    module: Any,
    name: str,
) -> None:
    begin = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args: signal.raise_signal(signal.SIGINT) or begin(*args))
    assert cli.main(["flywheel", *arguments]) == 130
    assert summary(tmp_path / "run") == Stats().summary(duration_s=summary(tmp_path / "run")["duration_s"])
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.parametrize("times", [1, 5])
def test_ctrl_c_while_serving(
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    times: int,
) -> None:
    step, served = InferenceServer.step, []

    def stepped(server: InferenceServer) -> bool:
        if server.stats.finished and not served:
            served.append(True)
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)
        return step(server)

    monkeypatch.setattr(InferenceServer, "step", stepped)
    assert cli.main([*ALONE, *arguments, *QUICK]) == 130
    assert 0 < summary(tmp_path / "run")["requests"] < 6
    assert {path.name for path in (tmp_path / "run").iterdir()} == SERVED


def test_an_error_of_the_program_is_not_hidden_and_loses_nothing(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = InferenceServer.step

    def stepped(server: InferenceServer) -> bool:
        if server.stats.finished:
            raise ValueError("a bug")
        return step(server)

    monkeypatch.setattr(InferenceServer, "step", stepped)
    assert cli.main([*ALONE, *arguments, *QUICK]) == 1
    run = tmp_path / "run"
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "aurora-rl: RuntimeError: serving stopped: ValueError: a bug; the traceback is in "
        f"{run / 'flywheel-traceback.txt'}"
    )
    assert 'raise ValueError("a bug")' in (run / "flywheel-traceback.txt").read_text()
    assert summary(run)["requests"] > 0
    assert {path.name for path in run.iterdir()} == SERVED | {"flywheel-traceback.txt"}


def test_a_checkpoint_says_what_its_drafter_is(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["drafter", "init", "--out", str(tmp_path / "d0"), "drafter.name=eagle3"]
    assert cli.main([*out, *arguments, "drafter.feature_layers=[1,2]", "run_dir=null"]) == 0
    served = [
        "flywheel",
        "learner.spawn=false",
        *arguments,
        *QUICK,
        "traffic.requests=1",
        f"drafter.path={tmp_path / 'd0'}",
    ]
    assert cli.main(served) == 0
    entries = json.loads((tmp_path / "run" / "drafter" / "config.json").read_text())
    assert entries["architectures"] == ["LlamaForCausalLMEagle3"]
    capsys.readouterr()
    for name, wrong in (
        ("medusa", "config.json is of Eagle3Drafter, and MedusaDrafter is asked for; ask for the former, or none"),
        ("null", f"{tmp_path / 'd0'}: config.json must hold an object, got []"),
    ):
        if name == "null":
            (tmp_path / "d0" / "config.json").write_text("[]")
        assert cli.main([*served, f"run_dir={tmp_path / 'again'}", f"drafter.name={name}"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert wrong in line and not (tmp_path / "again").exists()

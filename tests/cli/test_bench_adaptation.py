"""`aurora-rl bench adaptation` on a tiny model: the whole path, resumed, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.adaptation import simulation
from aurora_rl.adaptation.simulation import ArmRun
from aurora_rl.cli import bench_adaptation
from aurora_rl.cli.main import main

PAIRS = ["device=cpu", "dtype=float32", "drafter.vocab_size=64", "drafter.name=eagle3", "engine.max_length=512"]


def bench(model: Path, out: Path, *more: str, scenario: str = "smoke") -> int:
    options, pairs = ([word for word in more if ("=" in word) == pair] for pair in (False, True))
    return main(
        ["bench", "adaptation", "--scenario", scenario, "--out", str(out), *options, f"model={model}", *PAIRS, *pairs]
    )


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("adaptation") / "smoke"
    assert bench(tiny_folder, out) == 0
    return out


def test_the_whole_path(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert [run["arm"] for run in results["runs"]] == ["lookup", "scratch", "static", "suffix"]
    runs = {run["arm"]: run for run in results["runs"]}
    assert runs["scratch"]["swaps"] >= 1 and runs["static"]["swaps"] == runs["lookup"]["swaps"] == 0
    assert [phase["name"] for phase in results["phases"]] == ["code", "sql", "code"]
    assert {row["arm"] for row in results["live"]} == {"plain", "lookup", "suffix", "static", "scratch"}
    assert {row["phase"] for row in results["live"]} == {0, 1, 2}
    assert all(row["tokens_per_second"]["mean"] > 0 for row in results["live"])
    scratch = json.loads((finished / "arms" / "scratch-0" / "result.json").read_text())
    assert scratch["flops_per_step"] > 10**6 and scratch["steps"][-1] > 5
    static, tokens = json.loads((finished / "arms" / "static-0" / "result.json").read_text()), scratch["tokens"]
    assert static["tokens"] == tokens and len(tokens) == 24  # one stream for all
    assert (finished / "report.md").read_text().startswith("# the whole path")
    assert (finished / "acceptance.png").stat().st_size > 1000


def test_what_is_done_is_not_done_again(finished: Path, tiny_folder: Path) -> None:
    results = [*finished.glob("stream/*/*"), *finished.glob("arms/*/*.json"), *finished.glob("live/phase*")]
    before = {path: path.stat().st_mtime_ns for path in results}
    (finished / "arms" / "static-0" / "result.json").unlink()
    report = (finished / "report.md").read_text()
    assert bench(tiny_folder, finished, "http.port=8001", "telemetry.max_log=2000000") == 0  # no figure depends on them
    after = {path: path.stat().st_mtime_ns for path in results}
    changed = {path.parent.name for path in results if after[path] != before[path]}
    assert changed == {"static-0"}
    table = [line for line in (finished / "report.md").read_text().splitlines() if line.startswith("| static | 1 ")]
    assert table == [line for line in report.splitlines() if line.startswith("| static | 1 ")]


def test_an_interrupted_arm_goes_on_from_where_it_was_saved(
    finished: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result, state = finished / "arms" / "scratch-0" / "result.json", finished / "arms" / "scratch-0" / "state.pt"
    before = json.loads(result.read_text())
    result.unlink()
    monkeypatch.setattr(simulation, "_SAVED_EVERY", 8)
    simulate, started_at = bench_adaptation.simulate, []

    def interrupted(*arguments: Any, save: Callable[[dict[str, Any]], None], **options: Any) -> ArmRun:
        started_at.append(options["state"] and len(options["state"]["run"]["tokens"]))

        def save_and_stop(so_far: dict[str, Any]) -> None:
            save(so_far)
            if len(so_far["run"]["tokens"]) >= 16 and len(started_at) == 1:
                raise KeyboardInterrupt

        return simulate(*arguments, save=save_and_stop, **options)

    monkeypatch.setattr(bench_adaptation, "simulate", interrupted)
    assert bench(tiny_folder, finished) == 130
    assert state.exists() and not result.exists()
    assert bench(tiny_folder, finished) == 0
    assert started_at[0] is None and started_at[1] >= 16 and not state.exists()
    after = json.loads(result.read_text())
    clocks = {"learner_seconds": 0, "seconds": 0}
    assert after | clocks == before | clocks


def test_the_report_is_written_again(finished: Path) -> None:
    before = (finished / "report.md").read_text()
    for name in ("report.md", "acceptance.png"):
        (finished / name).unlink()
    assert main(["report", str(finished)]) == 0
    assert (finished / "report.md").read_text() == before and (finished / "acceptance.png").exists()


def test_other_settings_need_another_folder(
    finished: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tiny_folder, finished, "drafter.depth=3") == 2
    assert "name another folder by --out" in capsys.readouterr().err
    scenario = finished.parent / "other.yaml"
    text = (finished / "scenario.yaml").read_text()
    scenario.write_text(text.replace("requests: 8", "requests: 7", 1))
    assert bench(tiny_folder, finished, scenario=str(scenario)) == 2
    assert "holds results of stream phases" in capsys.readouterr().err


def test_an_arm_that_is_another_now_is_refused(
    finished: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = finished.parent / "arm.yaml"
    scenario.write_text((finished / "scenario.yaml").read_text().replace("trained: true", "trained: false"))
    assert bench(tiny_folder, finished, scenario=str(scenario)) == 2
    assert "has the result of another arm 'static'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--scenario", "shfit"], "there is no scenario 'shfit'; take"),
        (["--arms", "scratch,sttic"], "--arms: unknown 'sttic'; the scenario has lookup, suffix, static, scratch"),
        (["drafter.depht=3"], "did you mean 'drafter.depth'"),
        (["drafter.mode=sampled", "temperature=1"], "arms draft what is likeliest; set it to topk"),
        (["engine.name=sglang", "drafter.name=eagle3"], "engine.name=sglang is a server of its own"),
    ],
)
def test_bad_input_is_named_before_anything_runs(
    words: list[str], told: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(tiny_folder, tmp_path / "out", *words) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

"""The report of a scenario's folder: figures by phase, tables, and a picture."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.adaptation import report
from aurora_rl.adaptation.scenario import Arm, Phase, Scenario

SCENARIO = Scenario(
    about="a test",
    phases=[Phase(name, 4, ["code"]) for name in ("code", "sql", "code")],
    arms={"lookup": Arm(), "scratch": Arm(learns=True)},
    seeds=2,
    window=2,
)


def run(arm: str, seed: int, rounds: list[int], learns: bool) -> dict[str, Any]:
    return {
        "arm": arm, "seed": seed, "learns": learns, "learner_seconds": 1.0, "flops_per_step": 10**12,
        "tokens": [12] * 12, "rounds": rounds, "version": [request // 3 for request in range(12)],
        "steps": [2 * request if learns else 0 for request in range(1, 13)],
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = [
        run("lookup", 0, [10] * 12, False),
        run("scratch", 0, [12, 12, 8, 6, 12, 12, 8, 6, 7, 6, 6, 6], True),
        run("scratch", 1, [12, 12, 8, 6, 12, 12, 12, 12, 6, 6, 6, 6], True),
        run("left-out", 0, [12] * 12, True),
    ]
    for each in runs:
        path = tmp_path / "arms" / f"{each['arm']}-{each['seed']}" / "result.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(each))
    (tmp_path / "live").mkdir()
    samples = [
        {"arm": arm, "turn": turn, "tokens": 100, "seconds": seconds, "per_second": [100 / seconds]}
        for turn in range(3)
        for arm, seconds in (("plain", 10.0 + turn), ("lookup", 8.0), ("scratch", 5.0))
    ]
    (tmp_path / "live" / "phase-1-slots-2.json").write_text(json.dumps({"samples": samples}))
    return tmp_path


def test_figures_are_those_of_each_phase(folder: Path) -> None:
    results = report.collect(folder, SCENARIO)
    assert [(p["name"], p["first"], p["end"]) for p in results["phases"]] == [
        ("code", 0, 4), ("sql", 4, 8), ("code", 8, 12),
    ]  # fmt: skip
    lookup, scratch, again = results["runs"]
    assert [r["arm"] for r in results["runs"]] == ["lookup", "scratch", "scratch"]
    assert [p["acceptance"] for p in scratch["phases"]] == pytest.approx([48 / 38, 48 / 38, 48 / 25])
    # A third of four requests is one.
    assert [p["level"] for p in scratch["phases"]] == [2.0, 2.0, 2.0]
    assert [p["regained_after"] for p in scratch["phases"]] == [None, None, 3]
    assert again["phases"][2]["regained_after"] == 2
    assert scratch["phases"][0]["forgotten"] is None and scratch["phases"][1]["forgotten"] is None
    assert scratch["phases"][2]["forgotten"] == pytest.approx(1 - (48 / 25) / 2)
    assert scratch["levels"]["1.5"] == {"requests": 4, "tokens": 48, "flops": 8 * 10**12}
    assert scratch["levels"]["2.0"] == {"requests": 11, "tokens": 132, "flops": 22 * 10**12}
    assert lookup["levels"]["1.5"] is None and lookup["swaps"] == 3
    assert scratch["regret"] == ("lookup", pytest.approx(101 / 120 - 1))


def test_arms_that_learn_are_compared_with_those_that_do_not(folder: Path) -> None:
    rows = report.collect(folder, SCENARIO)["against_fixed"]
    assert [(row["arm"], row["seed"], row["fixed"], row["phase"]) for row in rows] == [
        ("scratch", seed, "lookup", phase) for seed in range(2) for phase in range(3)
    ]
    assert rows[2]["ratio"] == pytest.approx(40 / 25)
    assert all(row["interval_95"] is None for row in rows)  # of four requests


def test_speed_is_over_plain_decoding_of_the_same_turn(folder: Path) -> None:
    live = report.collect(folder, SCENARIO)["live"]
    speedups = {row["arm"]: row["speedups"] for row in live}
    assert speedups["scratch"] == pytest.approx([2.0, 2.2, 2.4]) and speedups["plain"] == [1.0, 1.0, 1.0]
    assert live[0]["slots"] == 2 and live[0]["name"] == "sql"
    assert {row["arm"]: row["speedup"] for row in live}["scratch"] == pytest.approx(2.2)


def test_a_speedup_can_be_charged_with_the_learner(folder: Path) -> None:
    rows = {row["arm"]: row for row in report.collect(folder, SCENARIO)["live"]}
    # A second of the learner's for 144 tokens of the stream, and a median turn of 0.11 s a token.
    assert rows["scratch"]["speedup_charged"] == pytest.approx(0.11 / (0.05 + 1 / 144))
    assert rows["plain"]["speedup_charged"] == 1.0


def test_of_two_turns_the_speedup_is_in_the_middle(folder: Path) -> None:
    path = folder / "live" / "phase-1-slots-2.json"
    samples = [sample for sample in json.loads(path.read_text())["samples"] if sample["turn"] < 2]
    path.write_text(json.dumps({"samples": samples}))
    speedups = {row["arm"]: row["speedup"] for row in report.collect(folder, SCENARIO)["live"]}
    assert speedups == pytest.approx({"plain": 1.0, "lookup": (10 / 8 + 11 / 8) / 2, "scratch": 2.1})


def test_the_report_can_be_written_again_from_its_file(folder: Path) -> None:
    results = report.collect(folder, SCENARIO)
    report.write(folder, results)
    for plot in ("acceptance.png", "recovery.png", "speedup.png"):
        assert (folder / plot).read_bytes()[:4] == b"\x89PNG"
    text = (folder / "report.md").read_text()
    assert report.markdown(json.loads((folder / "results.json").read_text())) == text
    for part in (
        "| scratch | 2 |",
        "never",
        "4 · 48 · 8.0",
        "| 2: sql | 2 | scratch |",
        "2.20 (2.00–2.40)",
        "lookup 1.60 |",
    ):
        assert part in text
    assert "left-out" not in text


def test_a_stream_without_shifts_has_no_table_of_them(folder: Path) -> None:
    shutil.rmtree(folder / "live")
    single = Scenario(phases=[Phase("code", 12, ["code"])], arms=SCENARIO.arms, window=2)
    text = report.markdown(report.collect(folder, single))
    assert "After each shift" not in text and "Output tokens per second" not in text


def test_a_folder_without_results_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no arm of the scenario has a result in"):
        report.collect(tmp_path, SCENARIO)


def test_parts_of_answers_count_by_request_and_by_position(folder: Path) -> None:
    path = folder / "arms" / "scratch-0" / "result.json"
    whole = json.loads(path.read_text())
    cut = {**whole, "positions": [0, 1] * 12}
    for key in ("tokens", "rounds"):
        cut[key] = [part for value in whole[key] for part in (value // 3, value - value // 3)]
    for key in ("version", "steps"):
        cut[key] = [part for value in whole[key] for part in (max(value - 1, 0), value)]
    path.write_text(json.dumps(cut))
    for name in ("lookup-0", "scratch-1", "left-out-0"):
        shutil.rmtree(folder / "arms" / name)
    shutil.rmtree(folder / "live")
    [by_part] = report.collect(folder, SCENARIO)["runs"]
    path.write_text(json.dumps(whole))
    [expected] = report.collect(folder, SCENARIO)["runs"]
    lengths = by_part.pop("by_position")
    assert by_part == expected
    early = sum(value // 3 for value in whole["rounds"])
    assert lengths == pytest.approx([48 / early, 96 / (sum(whole["rounds"]) - early)])
    results = report.collect(folder, SCENARIO) | {"part_tokens": 250}
    results["runs"][0]["by_position"] = lengths
    assert f"| scratch | 0 | {lengths[0]:.2f} | {lengths[1]:.2f} |" in report.markdown(results)
    assert "| to 250 | to 500 |" in report.markdown(results)

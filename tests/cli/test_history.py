"""`aurora-rl history`: what became of each version, from a run's events and the drafters that it kept."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from run_events import gate, swap, verdict, watchdog

from aurora_rl.cli.config import load_config
from aurora_rl.cli.history import versions
from aurora_rl.cli.main import main
from aurora_rl.policies import MedusaDrafter, TargetParts
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.testing import tiny_target


def test_what_events_say_of_versions() -> None:
    found = versions([
        gate(publish=False, version=0),
        gate(version=1, difference=0.0711, interval=[0.01, 0.13], requests=16),
        {"event": "trial", "version": 1, "against": 0, "requests": 40},
        verdict(version=1, promote=True, rounds=160, reason="a loss above 5% is ruled out"),
        swap(48, version=1),
        verdict(version=2, promote=False),
        {"event": "swap_failed", "version": 3, "reason": "rolled back before"},
        {"event": "trial", "version": 4, "against": 1, "requests": 90},
        watchdog(version=5, cause="dead", detail="it gives none", action="rolled back to version 1"),
    ])  # fmt: skip
    assert sorted(found) == [0, 1, 2, 3, 4, 5]
    assert (found[0].published, found[0].served) == ("the first drafter", "0")
    assert found[1].published == "gate: +0.071 (+0.010 to +0.130) over 16 requests" and found[1].served == "48"
    assert found[1].outcome == (
        "promoted after 160 rounds: a loss above 5% is ruled out; acceptance length 2.00 to 2.50, tokens/s 30.0 to 35.0"
    )
    assert found[2].outcome.startswith("rolled back after") and found[2].served == ""
    assert found[3].outcome == "not loaded: rolled back before"
    assert found[5].outcome == "dead (it gives none): rolled back to version 1"
    assert found[4].outcome == "on trial against version 1"


def test_a_version_of_a_resumed_learner_says_why_it_was_published() -> None:
    found = versions([
        {"event": "resumed", "version": None},  # after a training, which serves nothing
        {"event": "resumed", "version": 1},
        swap(8, version=1),
        {"event": "renumbered", "version": 9},
        {"event": "resumed"},  # of an earlier release
    ])  # fmt: skip
    assert {number: version.published for number, version in found.items()} == {
        0: "the first drafter",
        1: "resumed: what was served before",
        9: "published again: what was served before",
    }


def test_what_events_say_of_a_trial_at_a_share_of_the_engines() -> None:
    trial = {"event": "engine_trial", "version": 2, "against": 1, "engines": ["a"], "of": 4}
    ended = {
        "event": "engine_verdict", "version": 2, "against": 1, "published": 9, "promote": True, "requests": 64,
        "reason": "a loss above 5% is ruled out", "acceptance_length": {"old": 2.0, "new": 2.5},
        "tokens_per_second": None,
    }  # fmt: skip
    broken_off = {"published": 4, "promote": False, "requests": 0, "reason": "a went away", "acceptance_length": None}
    found = versions([trial, gate(version=2)])
    assert found[2].published.startswith("gate: ")
    assert found[2].outcome == "on trial at 1 of 4 engines against version 1"
    found = versions([trial, ended])
    assert found[2].outcome == (
        "promoted after 64 requests: a loss above 5% is ruled out; acceptance length 2.00 to 2.50"
    )
    assert found[9].published == "version 2, promoted"
    found = versions([trial, ended | broken_off])
    assert found[2].outcome == "rolled back after 0 requests: a went away"
    assert found[4].published == "version 1 again, for engines that had version 2"
    ready = {"event": "learner_ready", "seen": 8}
    assert versions([trial, ready])[2].outcome == "its trial ended with the learner"
    assert versions([trial, ended, ready])[2].outcome.startswith("promoted after")


def test_the_table_and_the_command_that_serves_a_kept_version(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", "server")
    log.write("swap", version=1, ms=2.5, requests=8)
    (tmp_path / "config.yaml").write_text("engine: {slots: 3}\n")
    drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
    save_drafter(drafter, tmp_path / "versions" / "1")
    assert main(["history", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "versions/1" in out and "the first drafter" in out
    words = shlex.split(out.strip().splitlines()[-1])
    assert words[:2] == ["aurora-rl", "serve"]
    config = load_config(words[3], words[4:])
    assert (config.engine.slots, config.drafter.path) == (3, str(tmp_path / "versions" / "1"))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["history", str(tmp_path)]) == 2
    assert f"{tmp_path} has no metrics.jsonl; name the folder of a run" in capsys.readouterr().err


def test_the_folder_of_a_training_has_no_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MetricsLog(tmp_path / "metrics.jsonl", "train").write("train", loss=2.0, batches=1)
    (tmp_path / "train.json").write_text("{}")
    assert main(["history", str(tmp_path)]) == 2
    out = capsys.readouterr()
    assert out.out == "" and out.err.startswith(f"aurora-rl: {tmp_path} is the folder of a training, which serves")

"""The examples run as a reader would run them."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from loopback_ports import free_ports

from aurora_rl.cli.config import load_config
from aurora_rl.objectives import make_objectives
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.testing import tiny_target, tiny_trajectory
from aurora_rl.trajectories import pack

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments], capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a script in this process: starting another one takes longer than most scripts. Returns what it prints."""

    def run_here(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        monkeypatch.syspath_prepend(EXAMPLES)
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_collector_learns_for_requests_that_it_has_not_learned_from(run_here: Callable[..., str]) -> None:
    out = run_here("collector.py")
    before, requests = re.search(r"^before: acceptance length ([\d.]+) on (\d+) requests", out, re.MULTILINE).groups()
    (after,) = re.findall(r"^after: acceptance length ([\d.]+)$", out, re.MULTILINE)
    assert int(requests) >= 30 and float(after) >= float(before) + 0.08
    # Each step is a version, which drafts the next batch.
    assert re.findall(r"^version (\d+): loss ", out, re.MULTILINE) == [str(number) for number in range(60)]
    assert len((EXAMPLES / "collector.py").read_text().split("def main")[1].splitlines()) < 45


@pytest.mark.parametrize("processes", [1, 2])
def test_multi_collector_delivers_what_it_was_asked_for(processes: int, run_here: Callable[..., str]) -> None:
    arguments = ("multi_collector.py", "--processes", str(processes))
    lines = (run if processes > 1 else run_here)(*arguments).splitlines()
    assert [line.split()[0] for line in lines] == [str(16 * processes)] * 3
    delivered = [float(re.search(r"and ([\d.]+) tokens", line).group(1)) for line in lines]
    assert all(1 <= value <= 4 for value in delivered)  # a bonus token, and at most the three accepted ones


def test_flywheel_serves_learns_and_swaps(tiny_folder: Path, run_here: Callable[..., str]) -> None:
    sizes = ["--requests", "8", "--round", "4", "--max-new-tokens", "12"]
    out = run_here("flywheel.py", "--model", str(tiny_folder), *sizes)
    versions = [int(v) for v in re.findall(r"^version (\d+): acceptance length [\d.]+", out, re.MULTILINE)]
    assert versions == list(range(len(versions))) and len(versions) >= 2


TRAINING = {
    "train_imitation.py": ["--divergence", "jensen_shannon", "--expected-length"],
    "train_discard.py": ["--weighting", "reach", "--top-k", "8"],
    "train_acceptance_reward.py": ["--baseline", "group"],
    "offline_to_online.py": ["--online", "6", "--round", "3"],
}


@pytest.mark.parametrize("name", TRAINING)
def test_training_scripts_go_from_a_recording_to_a_checkpoint(
    name: str, tiny_folder: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    common = ["--model", str(tiny_folder), "--recording", str(tmp_path / "stream"), "--requests", "10"]
    folder = ["--max-new-tokens", "8", "--out", str(tmp_path / "drafter")]
    out = run_here(name, *common, *folder, *TRAINING[name])
    assert re.search(r"^before: acceptance length [\d.]+ on 2 unseen requests$", out, re.MULTILINE)
    assert re.search(r"^8 requests: loss -?[\d.]+ ", out, re.MULTILINE)
    assert re.search(r"^after: acceptance length [\d.]+$", out, re.MULTILINE)
    assert {p.name for p in (tmp_path / "drafter").iterdir()} == {"config.json", "model.safetensors"}
    assert len(list((tmp_path / "stream").glob("*.safetensors"))) == 10
    if name == "offline_to_online.py":
        assert re.findall(r"^version (\d): acceptance length [\d.]+ over 3 requests$", out, re.MULTILINE) == ["0", "1"]


def test_chains_have_nothing_to_discard(
    tiny_folder: Path, tmp_path: Path, run_here: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--model", str(tiny_folder), "--recording", str(tmp_path / "stream"), "--requests", "6"]
    common += ["--max-new-tokens", "8", "--out", str(tmp_path / "drafter")]
    run_here("train_imitation.py", *common)  # records chains
    with pytest.raises(SystemExit, match=f"--out {tmp_path / 'drafter'} holds a drafter already; name another folder"):
        run_here("train_discard.py", *common)
    with pytest.raises(SystemExit):
        run_here("train_discard.py", *common, "--overwrite")
    assert f"there is nothing to discard: {tmp_path / 'stream'} holds chains alone" in capsys.readouterr().err


def test_a_new_drafter_is_checked_and_trained(tiny_folder: Path, tmp_path: Path, run_here: Callable[..., str]) -> None:
    common = ["--model", str(tiny_folder), "--recording", str(tmp_path / "stream"), "--requests", "10"]
    out = run_here("new_drafter.py", *common, "--max-new-tokens", "8", "--out", str(tmp_path / "drafter"))
    assert out.startswith("the drafter keeps the promises of the seam\nbefore: acceptance length ")
    assert re.search(r"^after: acceptance length [\d.]+$", out, re.MULTILINE)
    assert json.loads((tmp_path / "drafter" / "config.json").read_text())["architectures"] == ["RecurrentDrafter"]
    lines = (EXAMPLES / "new_drafter.py").read_text().split("class RecurrentDrafter")[1].split("\ndef main")[0]
    assert lines.count("\n") < 60


def test_a_new_objective_is_checked_trained_and_plotted(
    tiny_folder: Path, tmp_path: Path, run_here: Callable[..., str]
) -> None:
    common = ["--model", str(tiny_folder), "--recording", str(tmp_path / "stream"), "--requests", "10"]
    out = run_here("new_objective.py", *common, "--max-new-tokens", "8", "--plot", str(tmp_path / "plot.png"))
    assert re.findall(r"^(\w+): 8 requests", out, re.MULTILINE) == ["imitation", "reach_kl"]
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_the_documented_objective_is_that_of_the_example() -> None:
    code = (EXAMPLES / "new_objective.py").read_text()
    lines = "@register_objective" + code.split("@register_objective")[1].split("\n\ndef main")[0]
    assert f"```python\n{lines}```" in (EXAMPLES.parent / "docs" / "objectives.md").read_text()
    assert lines.count("\n") < 20


def test_the_new_objective_weights_by_what_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / "new_objective.py"))
    parts = TargetParts.of(tiny_target())
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(0, 32, 2)).double()
    batch = pack([tiny_trajectory(drafter)])
    (loss,) = make_objectives([{"name": "reach_kl", "steps": 2, "floor": 0.25}], drafter, parts.head)
    found = loss.values(batch)

    p = (batch["sequence", "hidden"] @ parts.head.weight.T)[:, drafter.draft_vocab].softmax(-1)
    first, second = (logits.softmax(-1) for logits in drafter.unroll(batch, 2).logits)
    kl = [(p * (p / q).log()).sum(-1) for q in (first, second)]
    # The second draft of a window is that of the next token, after the first of this window was accepted.
    weight = torch.minimum(p, first).sum(-1)[:-1].clamp(min=0.25)
    expected = torch.stack([kl[0], torch.cat([weight * kl[1][1:], kl[0].new_zeros(1)])])
    torch.testing.assert_close(found.value[found.valid], expected[found.valid])
    assert int(found.valid.sum()) > len(p)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*/*.yaml")), ids=lambda path: path.name)
def test_configurations_have_only_keys_and_values_that_exist(path: Path) -> None:
    assert load_config(path).engine.name == "sglang"


def test_the_library_loop_runs_by_its_configuration(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    traffic = tmp_path / "traffic.jsonl"
    texts = [f"What is {number} plus {number}?" for number in range(12)]
    traffic.write_text("".join(json.dumps({"messages": [{"role": "user", "content": t}]}) + "\n" for t in texts))
    ports = free_ports(2)
    pairs = [
        *(f"model={tiny_folder}", f"traffic.path={traffic}", "dtype=float32", "max_new_tokens=12", "gate.requests=2"),
        *("gate.margin=10", "learner.publish_every=4", "learner.batch_size=2", "learner.replay=1", "baseline.share=0"),
        *(f"wire.trajectories=tcp://127.0.0.1:{ports[0]}", f"wire.weights=tcp://127.0.0.1:{ports[1]}"),
        *(f"run_dir={tmp_path / 'run'}", "engine.max_length=256", "drafter.vocab_size=128"),
    ]
    monkeypatch.setattr(sys, "argv", ["flywheel.py", *pairs])
    runpy.run_path(str(EXAMPLES / "sglang_flywheel" / "flywheel.py"), run_name="__main__")
    assert re.search(r"^12 requests, \d+ swaps, acceptance length [\d.]+ -> [\d.]+", capsys.readouterr().out)

"""`aurora-rl flywheel --resume`."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
from run_events import events, summary
from safetensors.torch import load_file, save_file

from aurora_rl.cli import main as cli
from aurora_rl.cli import serve
from aurora_rl.cli.config import load_config
from aurora_rl.serving.server import InferenceServer
from aurora_rl.training.states import states


@pytest.mark.slow
def test_a_run_goes_on_from_what_it_learned(
    arguments: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    step, run = InferenceServer.step, tmp_path / "run"

    def stepped(server: InferenceServer) -> bool:
        if not server.stats.swap_ms:
            time.sleep(0.05)  # until there is something to go on from
        return step(server)

    monkeypatch.setattr(InferenceServer, "step", stepped)
    pairs = ["learner.publish_every=4", "learner.batch_size=2", "gate.requests=3", "learner.replay=1", "gate.margin=9"]
    pairs += ["drafter.adaptive=false", "baseline.share=0"]
    assert cli.main(["flywheel", *arguments, *pairs, "traffic.requests=30"]) == 0
    first, (over,) = summary(run), events(run, "learner_done")
    assert over["version"] and first["requests"] == 30
    saved = load_file(states(run / "learner")[0] / "drafter" / "model.safetensors")

    assert cli.main(["flywheel", "--resume", str(run), "traffic.requests=10"]) == 0
    assert json.loads((run / "part-1" / "summary.json").read_text()) == first
    assert {path.name for path in (run / "part-1").iterdir()} == set(serve._DOCUMENTS)
    assert load_config(run / "part-1" / "config.yaml").traffic.requests == 30
    config = load_config(run / "config.yaml")
    assert (config.traffic.requests, config.gate.requests, config.run_dir) == (10, 3, None)
    assert (config.drafter.path, config.learner.resume) == (None, None)  # as before: it starts another run elsewhere
    assert saved.keys() == load_file(states(run / "learner")[0] / "drafter" / "model.safetensors").keys()
    assert summary(run)["requests"] == 10 and len(events(run, "request")) == 40
    assert len((run / "answers.jsonl").read_text().splitlines()) == 40
    last = events(run, "learner_done")[-1]
    assert last["version"] > over["version"] and last["steps"] >= over["steps"] and last["seen"] >= over["seen"]
    later = [event for event in events(run, "train") if event["time"] > over["time"]]
    assert all(event["steps"] > over["steps"] for event in later)
    # The figures are of this part alone, and the engine had what was learned before it.
    assert max(event["requests"] for event in events(run, "swap")[first["swaps"] :]) <= 10
    assert summary(run)["versions_served"][1] > over["version"]

    # What is refused leaves the folder as it was.
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "metrics.jsonl"}
    log = (run / "metrics.jsonl").read_text()
    fine_tuned = shutil.copytree(tiny_folder, tmp_path / "fine-tuned") / "model.safetensors"
    weights = {name: tensor * 1.01 for name, tensor in load_file(fine_tuned).items()}
    save_file(weights, fine_tuned, metadata={"format": "pt"})
    refused = {
        "drafter.vocab_size=0": "drafter.vocab_size",
        "traffic.path=/no/file": "cannot read requests from /no/file",
        f"model={fine_tuned.parent}": "drafter was trained for others",
    }
    for pair, why in refused.items():
        assert cli.main(["flywheel", "--resume", str(run), pair]) == 2
        assert why in capfd.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir() if path.name != "metrics.jsonl"} == before
    assert (run / "metrics.jsonl").read_text() == log

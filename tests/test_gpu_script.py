"""benchmarks/gpu.sh on a CPU: every part runs, and a part that fails is named while the others go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
SCENARIO = """
phases: [{name: code, requests: 4, domains: [code]}, {name: sql, requests: 4, domains: [sql]}]
arms: {scratch: {learns: true}}
set: [engine.max_length=256, max_new_tokens=8, drafter.adaptive=false, learner.publish_every=4, gate.requests=2]
window: 2
live: {requests: 0}
"""


def run(out: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "SIZE": "tiny", "SLOTS": "1,2", **settings}
    environment |= {"CONTEXT": "16", "REPEATS": "3", "TEXTS": "32", "NODES": "4"}
    # A way of computing the loss in this process: each has one of its own otherwise, which takes seconds to start.
    environment |= {"KERNELS": "--way two_head_loss --width 8 --rows 40 --vocabs 96"}
    return subprocess.run([SCRIPT, out], env=environment, capture_output=True, text=True, timeout=240, check=False)


def test_every_part_runs_and_leaves_its_figures(tmp_path: Path, tiny_folder: Path) -> None:
    (tmp_path / "two.yaml").write_text(SCENARIO)
    done = run(tmp_path / "out", SCENARIO=str(tmp_path / "two.yaml"), MODEL=str(tiny_folder))
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = json.loads((tmp_path / "out" / "rounds.json").read_text())
    assert [cell["slots"] for cell in rounds["cells"]] == [1, 2]
    assert all(ratio > 0 for cell in rounds["cells"] for ratio in cell["break_even"].values())
    assert rounds["hardware"] and rounds["versions"]["torch"]
    attention = json.loads((tmp_path / "out" / "tree_attention.json").read_text())
    assert [(cell["slots"], cell["nodes"]) for cell in attention["cells"]] == [(1, 4), (8, 4)]
    assert all("tree_attention" in cell["us"] and not cell["failed"] for cell in attention["cells"])
    assert json.loads((tmp_path / "out" / "kernels.log").read_text().splitlines()[-1])["ms"] > 0
    adaptation = json.loads((tmp_path / "out" / "adaptation.json").read_text())
    assert [run["arm"] for run in adaptation["runs"]] == ["scratch"] and len(adaptation["phases"]) == 2


def test_a_part_that_fails_is_named_and_the_next_runs(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$1" in *rounds.py) echo "it is broken"; exit 3;; *) echo "fine";; esac\n')
    python.chmod(0o755)
    done = run(tmp_path / "out", PYTHON=str(python))
    assert done.returncode == 1
    assert "rounds: failed after" in done.stdout and "it is broken" in done.stdout
    assert (tmp_path / "out" / "adaptation.log").read_text() == "fine\n"
    assert done.stdout.splitlines()[-1] == "failed: rounds"

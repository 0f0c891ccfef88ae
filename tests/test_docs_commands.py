"""The commands of the pages run, on tiny models, where that takes a second; of the others a table says why not.

The names of their keys and options are checked in `test_docs.py`, and `test_roads.py` runs the pages of a public
checkpoint's road whole.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import imported
from pages import DOCS, ROOT, blocks, commands, page_name, pages_with

from aurora_rl import testing
from aurora_rl.cli import assembly, spec
from aurora_rl.cli import main as cli
from aurora_rl.cli.config import load_config
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.training.learner import Learner

ROADS = {DOCS / f"{page}.md" for page in ("day0", "warm_start", "fine_tuned", "export")}
SERVES = "it measures rounds for two seconds, and its learner is a fresh interpreter, whose imports take eight"
SERVER = "it asks a server in an environment of its own"
NOT_RUN = {
    "aurora-rl serve": f"{SERVES}: tests/faults/test_serve.py",
    "aurora-rl flywheel": f"{SERVES}: tests/faults/test_flywheel.py",
    "aurora-rl fleet": "a Ray cluster starts its members: tests/faults/test_fleet.py",
    "aurora-rl history": "test_docs.py runs it, on a run that it makes",
    "aurora-rl sglang": f"{SERVER}: tests/envs/sglang/test_client_attach.py",
    "aurora-rl vllm": f"{SERVER}: tests/vllm/test_vllm.py",
    "aurora-rl bench adaptation": "it serves every arm with a learner of its own: tests/cli/test_bench_adaptation.py",
    "torchrun": "it starts fresh interpreters: tests/faults/test_ranks.py",
    "python -m": SERVER,
    "vllm": SERVER,
    "llama-server": SERVER,
    "aiperf": SERVER,
    "curl": "tests/serving/http asks a server such things, and test_docs.py reads its body",
    "make": "it installs, tests or serves for minutes; `make --dry-run` runs here",
    "python benchmarks/": "it takes five seconds of CPU time or more; its own parser takes its arguments here",
}
RUN_SCRIPTS = ("scaling.py",)
OF_US = ("aurora-rl check", "aurora-rl drafter", "aurora-rl keys", "aurora-rl learn", "aurora-rl bench objectives")
RUN = (*OF_US, *(f"python benchmarks/{each}" for each in RUN_SCRIPTS))
SMALL = ("device=cpu", "dtype=float32", "drafter.vocab_size=64", "engine.max_length=256", "learner.batch_size=2")


def said(words: list[str]) -> str:
    """A command as the table names it."""
    return shlex.join([words[0].removeprefix(".venv/bin/"), *words[1:]])


def runs(page: Path, words: list[str]) -> bool:
    return (page in ROADS and words[0] == "aurora-rl") or said(words).startswith(RUN)


@pytest.mark.parametrize("page", pages_with("bash"), ids=page_name)
def test_a_command_runs_or_the_table_says_why_not(page: Path) -> None:
    unknown = [
        words for words in commands(page) if not runs(page, words) and not said(words).startswith(tuple(NOT_RUN))
    ]
    assert unknown == []


def test_the_table_names_no_command_that_is_on_no_page() -> None:
    every = [said(words) for page in pages_with("bash") for words in commands(page) if not runs(page, words)]
    assert [reason for reason in NOT_RUN if not any(each.startswith(reason) for each in every)] == []


# ---- aurora-rl ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of seven layers, so that EAGLE-3's usual three are three."""
    return testing.tiny_folder(tmp_path_factory.mktemp("target"), num_layers=7)


@pytest.fixture(scope="module")
def drafter(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes an EAGLE-3 of the target, with adapters or without."""

    def write(format: str | None = None, *pairs: str) -> Path:
        resolved = spec.resolve(load_config(overrides=[f"model={target}", "drafter.name=eagle3", *SMALL, *pairs]))
        folder = tmp_path_factory.mktemp("drafter") / "drafter"
        assembly.start_drafter(resolved, assembly.load(resolved), []).save_pretrained(folder, format=format)
        return folder

    return write


@pytest.fixture(scope="module")
def recording(target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six requests, and next to them the drafter that they were drafted by."""
    pairs = [f"model={target}", "drafter.name=eagle3", "drafter.mode=sampled", *SMALL]
    resolved = spec.resolve(load_config(overrides=pairs))
    loaded = assembly.load(resolved)
    drafter, folder = assembly.start_drafter(resolved, loaded, []), tmp_path_factory.mktemp("recorded")
    drafter.save_pretrained(folder / "drafter-day0")
    requests = [Request(i, torch.randint(250, (5,)), SamplingParams(1.0, seed=i, max_tokens=8)) for i in range(6)]
    record_requests(loaded.model, drafter, requests, TrajectoryDataset(folder / "stream"), shape=resolved.tree)
    return folder


PACKAGE = {
    "my_module.py": """
from aurora_rl.policies import Eagle3Drafter


class MyDrafter(Eagle3Drafter):
    pass
""",
    "losses.py": "\n".join(blocks(DOCS / "objectives.md", "python")),
}


def of_page(*starts: str) -> list[Any]:
    """Commands that begin in one of these ways, each once, of pages that are not run whole."""
    found: dict[str, Any] = {}
    for page in pages_with("bash"):
        for words in commands(page) if page not in ROADS else ():
            if said(words).startswith(starts):
                found.setdefault(said(words), pytest.param(words, id=f"{page.stem}: {said(words)[:60]}"))
    return list(found.values())


@pytest.mark.parametrize("words", of_page(*OF_US))
def test_a_command_of_a_page_runs(
    words: list[str],
    target: Path,
    drafter: Callable[..., Path],
    recording: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal_handlers: None,
) -> None:
    """In a folder that has what it reads. A learner is stopped as it begins to wait for its first batch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_package").mkdir()
    for file, text in PACKAGE.items():
        (tmp_path / "my_package" / file).write_text(text)
    (tmp_path / "code.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "one"}]}))
    _, command, *rest = words
    pairs = [] if command == "keys" else [f"model={target}", *SMALL]
    if command == "learn":
        assert "wire.keys=KEYS" not in rest or cli.main(["keys", "KEYS"]) == 0
        pairs += [f"wire.{half}=ipc://{tmp_path}/{half}" for half in ("trajectories", "weights")]
        monkeypatch.setattr(Learner, "step", lambda learner: os.kill(os.getpid(), signal.SIGTERM))
    adapters = ["drafter.adapters=[acme,globex]", "drafter.adapter_rank=8"] if "--adapter" in rest else []
    format = next((rest[place + 1] for place, word in enumerate(rest) if word == "--from"), None)
    swapped = []
    for before, word in zip(["", *rest], rest, strict=False):
        key = word.partition("=")[0]
        if before in ("--drafter", "inspect"):
            word = str(drafter(format, *adapters))
        elif before == "--recording":
            word = str(recording / "stream")
        elif key == "drafter.path":
            word = f"{key}={recording / 'drafter-day0'}"
        if key != "model":
            swapped.append(word)
    options = ["--seeds", "1", "--every", "2", "--ahead", "2"] if command == "bench" else []
    first = next((place for place, word in enumerate(swapped) if "=" in word), len(swapped))
    assert cli.main([command, *swapped[:first], *options, *swapped[first:], *pairs]) == 0


# ---- scripts and make -----------------------------------------------------------------------------------------------


class Parsed(Exception):
    """A script has its arguments."""


@pytest.mark.parametrize("words", [each for each in of_page("python", "torchrun") if "benchmarks/" in each.id])
def test_the_parser_of_a_script_takes_its_arguments(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = next(i for i, word in enumerate(words) if word.startswith("benchmarks/"))
    script = imported(Path(words[place]).stem, monkeypatch)
    take = argparse.ArgumentParser.parse_args

    def parse(self: argparse.ArgumentParser, *args: Any) -> None:
        take(self, *args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", words[place:])
    with pytest.raises(Parsed):
        script.main()


@pytest.mark.parametrize("script", RUN_SCRIPTS)
def test_a_script_of_a_page_runs(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = [each.values[0] for each in of_page(f"python benchmarks/{script}")]
    monkeypatch.setattr(sys, "argv", [*words[1:], "--out", str(tmp_path)])
    imported(Path(script).stem, monkeypatch).main()
    assert list(tmp_path.iterdir())


def test_make_knows_how_to_make_what_pages_name() -> None:
    found = {said(words) for page in pages_with("bash") for words in commands(page) if words[0] == "make"}
    for words in map(shlex.split, sorted(found)):
        done = subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

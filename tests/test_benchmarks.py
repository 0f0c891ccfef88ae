"""The benchmarks fit the library that they measure."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from aurora_rl.models.loading import load_target

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def imported(name: str, monkeypatch: pytest.MonkeyPatch):
    """Import a script as running it would; its name and its neighbour `common` are forgotten after the test."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    for each in {"common", name}:
        monkeypatch.setitem(sys.modules, each, None)  # so that the end of the test forgets what is imported now
        del sys.modules[each]
    module = importlib.import_module(name)
    assert module.__file__ is not None and Path(module.__file__).parent == BENCHMARKS
    return module


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda script: script.stem)
def test_a_script_imports_what_is_there(script: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(script.stem, monkeypatch)


def test_prompts_become_greedy_requests(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    common, (model, tokenizer) = (
        imported("common", monkeypatch),
        load_target(tiny_folder, dtype=torch.float32, device="cpu"),
    )
    monkeypatch.setattr(sys, "argv", ["script.py", "--limit", "3", "--max-new-tokens", "5", "--device", "cpu"])
    options = common.parse(common.arguments(None))
    requests = common.request_queue(options, common.prompts(options), model, tokenizer)
    usual = common.usual_request(options, requests)
    served = list(iter(requests, None))
    assert [r.id for r in served] == [0, 1, 2]
    assert all((r.sampling.temperature, r.sampling.max_tokens) == (0, 5) for r in [usual, *served])

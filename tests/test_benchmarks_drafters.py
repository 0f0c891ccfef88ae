"""Benchmarks of drafters count rightly what they time and what they compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType

import pytest
import torch
from benchmark_scripts import imported

from aurora_rl.models.loading import load_target
from aurora_rl.policies import TargetParts
from aurora_rl.testing import tiny_batch, tiny_target, tiny_trajectory, topk_form
from aurora_rl.trajectories import pack


def test_contrary_tenants_with_an_adapter_each_accept_more_of_what_is_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters, parts = imported("adapters", monkeypatch), TargetParts.of(tiny_target(dtype=torch.float32))
    stream, options = adapters.contrary(96), argparse.Namespace(rank=8, every=32)
    first, second = stream[:2]
    assert torch.equal(first["sequence", "tokens"][:4], second["sequence", "tokens"][:4])
    assert not torch.equal(first["sequence", "tokens"][4:], second["sequence", "tokens"][4:])
    curves = adapters.compared(parts, torch.arange(32), stream, options, 0, torch.float32)
    (_, shared, of_shared), (_, own, of_own) = curves["shared"][-1], curves["adapters"][-1]
    assert own > shared + 0.05 and all(b > a for a, b in zip(of_shared, of_own, strict=True))


def on_tiny(module: ModuleType, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a script that measures SmolLM2 load the tiny target."""
    monkeypatch.setattr(module, "load_target", lambda _, **settings: load_target(folder, **settings))


def test_drafts_are_timed_with_adapters_and_without(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = imported("adapters", monkeypatch)
    on_tiny(adapters, tiny_folder, monkeypatch)
    options = argparse.Namespace(device="cpu", vocab_size=64, rank=2, max_new_tokens=6)
    monkeypatch.setattr(adapters, "MAX_LENGTH", 128)
    assert adapters.draft_milliseconds(options, 2, (), (None,)) > 0
    assert adapters.draft_milliseconds(options, 2, adapters.TENANTS, adapters.TENANTS) > 0


def test_a_drafter_is_served_and_timed_after_its_stream(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafters = imported("drafters", monkeypatch)
    on_tiny(drafters, tiny_folder, monkeypatch)
    monkeypatch.setattr(drafters, "MAX_LENGTH", 512)
    options = argparse.Namespace(
        device="cpu", requests=2, live=1, depth=2, width=1, nodes=2, vocab_size=64, work=tmp_path, max_new_tokens=8
    )
    world = drafters.World(options, None)
    stream = list(world.stream([0]))
    found = drafters.serve(drafters.load(world), "ngram")
    assert len(stream) == 2 and found["draft_ms"] > 0 and found["acceptance_length"] >= 1


def test_the_share_of_tokens_that_a_draft_vocabulary_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    drafters, length = imported("drafters", monkeypatch), torch.tensor(1)
    tokens = torch.tensor([9, 1, 2, 20_000])  # the first is the prompt's
    stream = [{("sequence", "tokens"): tokens, ("sequence", "prompt_length"): length}]
    prior = torch.arange(30_000.0, 0, -1)  # the lowest ids are the likeliest
    assert drafters.held(stream, prior) == {rows: 0.6667 for rows in (2048, 4096, 8192, 16384)}


def test_tails_of_a_whole_vocabulary_change_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    likeliest = imported("likeliest", monkeypatch)
    drafter, head, _ = tiny_batch()
    trajectory = tiny_trajectory(drafter)
    (values, exact), (same, near), (others, _) = (
        likeliest.gradient(drafter, head, pack([each]))
        for each in (trajectory, topk_form(trajectory, head, len(head)), topk_form(trajectory, head, 2))
    )
    assert torch.allclose(values, same) and torch.allclose(exact, near) and not torch.allclose(values, others)

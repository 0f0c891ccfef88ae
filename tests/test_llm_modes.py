"""LLM: what PyTorch's modes and defaults around it change, which is nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_rl import LLM, Completion, Eagle3Drafter, SamplingParams, TargetParts
from aurora_rl.models.draft_vocab import token_prior
from aurora_rl.models.loading import load_target

SHORT = SamplingParams(max_tokens=24)


def texts(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


@pytest.mark.parametrize("saved", [False, True])
def test_it_serves_and_learns_in_float32_whatever_the_default_dtype(
    tiny_folder: Path, tmp_path: Path, saved: bool
) -> None:
    drafter: str | Path = "eagle3"
    if saved:
        start = LLM(tiny_folder, drafter="eagle3", device="cpu").drafter
        assert start is not None
        drafter = tmp_path / "drafter"
        start.save_pretrained(drafter)

    def served() -> tuple[list[list[int]], float]:
        llm = LLM(tiny_folder, drafter=drafter, device="cpu", record=True)
        completions = llm.generate(["abc", "de", "f"], SHORT)
        assert completions[0].acceptance_length is not None and llm.drafter is not None
        assert {weight.dtype for weight in llm.drafter.parameters()} == {torch.float32}
        torch.manual_seed(0)
        return texts(completions), llm.learn(completions, batch_size=1)

    usual = served()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            again = served()
        finally:
            torch.set_default_dtype(torch.float32)
        assert again[0] == usual[0] and again[1] == pytest.approx(usual[1], rel=1e-6)


def test_drafters_and_what_chooses_their_vocabulary_are_in_float32(tiny_folder: Path) -> None:
    target, _ = load_target(str(tiny_folder), dtype=torch.float32, device="cpu")
    torch.set_default_dtype(torch.bfloat16)
    try:
        drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16))
        prior = token_prior(target, [[1, 2, 3]])
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weight.dtype for weight in [*drafter.parameters(), prior]} == {torch.float32}


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_whatever_mode_its_caller_is_in(tiny_folder: Path, mode: Callable[[], Any]) -> None:
    with mode():
        llm = LLM(tiny_folder, drafter="medusa", device="cpu", record=True)
        completions = llm.generate("abc", SHORT)
        assert llm.learn(completions, replay=0) > 0
    assert llm.learn(completions, replay=0) > 0
    assert texts(llm.generate("abc", SHORT)) == texts(completions)


def test_a_drafter_that_cannot_learn_is_named(tiny_folder: Path) -> None:
    target, _ = load_target(str(tiny_folder), dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16))
    llm = LLM(tiny_folder, drafter=drafter, device="cpu", record=True)
    with pytest.raises(
        ValueError, match=r"the drafter was made under torch.inference_mode\(\) and cannot learn; make it"
    ):
        llm.learn(llm.generate("abc", SHORT))

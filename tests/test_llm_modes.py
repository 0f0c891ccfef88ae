"""LLM: what PyTorch's modes and defaults around it change, which is nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aurora_rl import LLM, Completion, SamplingParams

SHORT = SamplingParams(max_tokens=24)


def texts(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]


def test_it_serves_and_learns_in_float32_whatever_the_default_dtype(tiny_folder: Path) -> None:
    def served() -> tuple[list[list[int]], float]:
        llm = LLM(tiny_folder, drafter="eagle3", device="cpu", record=True)
        completions = llm.generate("abc", SHORT)
        assert completions[0].acceptance_length is not None and llm.drafter is not None
        assert {weight.dtype for weight in llm.drafter.parameters()} == {torch.float32}
        return texts(completions), llm.learn(completions, replay=0)

    usual = served()
    torch.set_default_dtype(torch.float64)
    try:
        again = served()
    finally:
        torch.set_default_dtype(torch.float32)
    assert again[0] == usual[0] and again[1] == pytest.approx(usual[1], rel=1e-6)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_whatever_mode_its_caller_is_in(tiny_folder: Path, mode: Callable[[], Any]) -> None:
    with mode():
        llm = LLM(tiny_folder, drafter="medusa", device="cpu", record=True)
        completions = llm.generate("abc", SHORT)
        assert llm.learn(completions, replay=0) > 0
    assert llm.learn(completions, replay=0) > 0
    assert texts(llm.generate("abc", SHORT)) == texts(completions)

"""Unpatched SGLang, on the stand-in for its kernels and with our plugin loaded, says what transformers says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from aurora_rl.envs import Request, SamplingParams

pytestmark = pytest.mark.sglang

PROMPTS = [torch.tensor([10, 20, 30, 40, 50]), torch.arange(100, 140), torch.tensor([7])]
NEW_TOKENS = 48


@pytest.fixture(scope="module")
def expected(sglang_models: Path) -> list[list[int]]:
    """Greedy continuations in fp32, token for token."""
    model = LlamaForCausalLM.from_pretrained(sglang_models / "target", dtype=torch.float32)
    continuations = []
    for prompt in PROMPTS:
        said = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        continuations.append(said[0, len(prompt) :].tolist())
    return continuations


@pytest.mark.parametrize(("kind", "depth"), [("chain", 3), ("tree", 2)])
def test_greedy_output_is_that_of_transformers(
    request: pytest.FixtureRequest, kind: str, depth: int, expected: list[list[int]]
) -> None:
    engine = request.getfixturevalue(kind)
    # The second prompt twice: then it is found in the prefix cache.
    answers = [
        engine.generate(Request(i, p, SamplingParams(max_tokens=NEW_TOKENS)))
        for i, p in enumerate([*PROMPTS, PROMPTS[1]])
    ]
    assert [answer.tokens.tolist() for answer in answers] == [*expected, expected[1]]
    # What has to be told apart from plain decoding: whole paths accepted, and rounds in which nothing was.
    assert {count for answer in answers for count in answer.accepted} == set(range(depth + 1))

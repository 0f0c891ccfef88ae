"""LLM: what is a prompt, and what is named where one should stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from aurora_rl import LLM, SamplingParams
from aurora_rl.envs import Request

SHORT = SamplingParams(max_tokens=24)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, device="cpu")


@pytest.mark.parametrize("prompts", [None, 5, {"hi"}])
def test_what_is_no_prompt_is_named(plain: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="prompts is a .*; give a text, token ids, a list of messages"):
        plain.generate(prompts)
    with pytest.raises(ValueError, match=r"sampling_params is a dict; give SamplingParams"):
        plain.generate("hi", [{"max_tokens": 3}])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (b"abc", "it is b'abc'; give a text"),
        (torch.ones(2, 3), r"it is a tensor of shape \[3\] and torch.float32; give a text"),
        (np.ones((2, 3)), r"it is array\(\[1., 1., 1.\]\); give a text"),
        (torch.tensor(3), r"it is a tensor of shape \[\] and torch.int64; give a text"),
        ({"role": "user", "content": "hi"}, r"it is \{.*\}; give a text, a list of token ids, or a list of messages"),
        ({"prompt": "hi"}, "an object with 'prompt' is no prompt; give the text itself"),
        ({"prompt_token_ids": [3, 4]}, "an object with 'prompt_token_ids' is no prompt; give the ids themselves"),
        ("a\ud800", r"a text has '\\ud800', half a surrogate pair, which no tokenizer takes; remove it"),
        ([{"role": "user", "content": "\udc00"}], r"a text has '\\udc00', half a surrogate pair"),
        ([{"prompt": "hi"}], "an object with 'prompt' is no prompt; give the text itself"),
    ],
)
def test_a_prompt_of_another_kind_is_named(plain: LLM, prompts: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"prompt 0 cannot be served: {says}"):
        plain.generate(prompts)


def test_a_chat_is_judged_as_over_http(plain: LLM) -> None:
    def served(messages: list[dict[str, Any]]) -> Tensor:
        return plain.generate(messages, SHORT)[0].tokens

    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    chat = [{"role": "system", "content": ""}, {"role": "user", "content": "a\nb"}]
    assert torch.equal(served([{"role": "developer", "content": ""}, {"role": "user", "content": parts}]), served(chat))
    served([{"role": "user", "content": ""}])  # the template takes it
    for content, role, says in ((None, "user", "content is missing"), ("hi", "wizard", 'role is "wizard"; give one')):
        with pytest.raises(ValueError, match=rf"prompt 0 cannot be served: messages\[0\]\.{says}"):
            served([{"role": role, "content": content}])


@pytest.mark.parametrize("kind", [torch.tensor, np.array])
def test_ids_of_two_dimensions_are_a_batch(plain: LLM, kind: Callable[[Any], Any]) -> None:
    ids = [[3, 4, 5], [6, 7, 8]]
    assert [c.tokens.tolist() for c in plain.generate(kind(ids), SHORT)] == [
        c.tokens.tolist() for c in plain.generate(ids, SHORT)
    ]
    assert plain.generate(kind(ids[0]), SHORT)[0].tokens.tolist() == plain.generate(ids[0], SHORT)[0].tokens.tolist()


def test_no_budget_is_what_the_context_leaves(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, device="cpu", max_length=40)
    (completion,) = llm.generate([[3, 4, 5]], SamplingParams(max_tokens=None, ignore_eos=True))
    assert len(completion.tokens) == 37
    with pytest.raises(ValueError, match="a prompt of 40 tokens and 1 new ones exceed the context of 40"):
        llm.generate([[3] * 40], SamplingParams(max_tokens=None))
    with pytest.raises(ValueError, match="max_tokens is None; give a number: only LLM works out"):
        Request(0, torch.tensor([3]), SamplingParams(max_tokens=None))

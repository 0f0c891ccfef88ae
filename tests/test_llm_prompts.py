"""LLM: what is a prompt, and what is named where one should stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora_rl import LLM, SamplingParams

SHORT = SamplingParams(max_tokens=24)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, device="cpu")


@pytest.mark.parametrize("prompts", [{"role": "user", "content": "hi"}, {"prompt": "hi"}, None, 5, {"hi"}])
def test_what_is_no_prompt_is_named(plain: LLM, prompts: Any) -> None:
    with pytest.raises(ValueError, match="prompts is a .*; give a text, token ids, a list of messages"):
        plain.generate(prompts)
    with pytest.raises(ValueError, match=r"sampling_params is a dict; give SamplingParams"):
        plain.generate("hi", [{"max_tokens": 3}])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        (b"abc", "it is b'abc'; give a text"),
        (torch.ones(2, 3), r"it is a tensor of shape \[2, 3\] and torch.float32; give a text"),
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

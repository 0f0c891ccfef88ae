"""Prompts of an LLM: texts, token ids and chats, each with its sampling parameters."""

from __future__ import annotations

import contextlib
import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from aurora_rl.models.loading import encode_chat
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.workload.request_values import chat_messages, check_texts

_OF_VLLM = {"prompt_token_ids": "the ids themselves", "prompt": "the text itself"}  # its prompts, and what to give

PromptType = str | Sequence[int] | Tensor | Sequence[Mapping[str, Any]]
"""A text to continue, token ids ``[P]``, or the messages of a chat, each with "role" and "content", as over HTTP. Ids
``[n, P]`` are ``n`` prompts, padding included."""


def prompts_with_params(
    prompts: PromptType | Sequence[PromptType], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[PromptType, SamplingParams]]:
    """Return each prompt with its parameters.

    Args:
        prompts: One prompt or several.
        sampling_params: Parameters of all, or of each; None decodes greedily.

    Raises:
        ValueError: An argument is of another kind, or there are neither one nor as many parameters as prompts.

    Example:
        >>> [(prompt, params.temperature) for prompt, params in prompts_with_params(["a", [5, 6]], None)]
        [('a', 0.0), ([5, 6], 0.0)]
    """
    if not hasattr(prompts, "__getitem__"):
        raise ValueError(
            f"prompts is a {type(prompts).__name__}; give a text, token ids, a list of messages with role and content, "
            "or a list of these"
        )
    if isinstance(prompts, str | Mapping) or hasattr(prompts, "ndim"):
        alone = getattr(prompts, "ndim", 1) < 2
    else:
        alone = len(prompts) > 0 and isinstance(prompts[0], Integral | Mapping)
    listed: list[Any] = [prompts] if alone else list(prompts)
    if sampling_params is None:
        sampling_params = SamplingParams()
    params = list(sampling_params) if isinstance(sampling_params, Sequence) else [sampling_params] * len(listed)
    if wrong := [type(each).__name__ for each in params if not isinstance(each, SamplingParams)]:
        raise ValueError(f"sampling_params is a {wrong[0]}; give SamplingParams(...), or a list of them")
    if len(params) != len(listed):
        raise ValueError(f"there are {len(listed)} prompts and {len(params)} SamplingParams; give one, or as many")
    return list(zip(listed, params, strict=True))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: PromptType) -> Tensor:
    """Return the token ids of a prompt, ``[P]`` int64.

    Raises:
        ValueError: It is no prompt, or a chat or a text that cannot be served. The message names the part and the fix.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.models.loading import load_target
        >>> from aurora_rl.testing import tiny_folder
        >>> with TemporaryDirectory() as folder:
        ...     _, tokenizer = load_target(tiny_folder(folder), dtype=torch.float32, device="cpu")
        >>> encode_prompt(tokenizer, [5, 6])
        tensor([5, 6])
        >>> len(encode_prompt(tokenizer, [{"role": "user", "content": "Hello"}])) > 5
        True
    """
    if isinstance(prompt, str):
        check_texts(prompt)
        return torch.tensor(tokenizer(prompt)["input_ids"], dtype=torch.int64)
    parts = [prompt] if isinstance(prompt, Mapping) else prompt if isinstance(prompt, Sequence) else []
    objects = [part for part in parts if isinstance(part, Mapping)]
    for key, fix in _OF_VLLM.items():
        if any(key in each and "role" not in each for each in objects):
            raise ValueError(f"an object with {key!r} is no prompt; give {fix}")
    if objects and parts is prompt:
        messages = chat_messages([dict(part) if isinstance(part, Mapping) else part for part in prompt], by="LLM")
        check_texts(messages)
        return torch.tensor(encode_chat(tokenizer, messages), dtype=torch.int64)
    with contextlib.suppress(TypeError, ValueError, RuntimeError):
        tokens = torch.as_tensor(prompt)
        if tokens.ndim == 1 and not (len(tokens) and (tokens.is_floating_point() or tokens.dtype == torch.bool)):
            return tokens.long()
    got = reprlib.repr(prompt)
    if isinstance(prompt, Tensor):
        got = f"a tensor of shape {list(prompt.shape)} and {prompt.dtype}"
    raise ValueError(f"it is {got}; give a text, a list of token ids, or a list of messages with role and content")

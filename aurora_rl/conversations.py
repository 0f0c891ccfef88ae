"""Prompts to requests: chat template, token budget and seeds, and the follow-up turns of a conversation."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.models import encode_chat
from aurora_rl.traffic import Prompt, TrafficError


class Conversations:
    """A source of requests: first turns in order, each follow-up after the answer to the turn before it.

    Args:
        prompts: the traffic.
        tokenizer: the target's.
        max_new_tokens: budget of each completion.
        max_length: tokens that a slot holds, prompt and completion.
        sampling: temperature, top-k and top-p; each request's seed is this seed plus its id.

    Attributes:
        total: first turns and follow-ups, the requests that will be served if none fails.
        failed: messages of follow-ups that could not be asked.

    Raises:
        TrafficError: a first turn does not fit the context, before anything is served; names the prompt.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_new_tokens: int,
        max_length: int,
        sampling: SamplingParams,
    ) -> None:
        self._tokenizer, self._max_new_tokens, self._max_length = tokenizer, max_new_tokens, max_length
        self._sampling = sampling
        self._waiting: deque[tuple[Prompt, list[dict[str, str]], int, list[int]]] = deque()
        self._open: dict[int, tuple[Prompt, list[dict[str, str]], int]] = {}
        self._next_id = 0
        self.total = sum(1 + len(prompt.follow_ups) for prompt in prompts)
        self.failed: list[str] = []
        for prompt in prompts:
            messages = [dict(message) for message in prompt.messages]
            tokens = encode_chat(tokenizer, messages)
            if len(tokens) + max_new_tokens > max_length:
                raise TrafficError(
                    f"prompt {prompt.id!r} has {len(tokens)} tokens; with max_new_tokens={max_new_tokens} that exceeds "
                    f"engine.max_length={max_length}; shorten it, or raise engine.max_length up to the model's context"
                )
            self._waiting.append((prompt, messages, 0, tokens))

    def first_prompts(self, count: int) -> list[list[int]]:
        """Token ids of the first prompts, for the day-0 draft vocabulary."""
        return [tokens for _, _, _, tokens in list(self._waiting)[:count]]

    def __call__(self) -> Request | None:
        """The next request, None where none waits."""
        if not self._waiting:
            return None
        prompt, messages, turn, tokens = self._waiting.popleft()
        request = Request(
            id=self._next_id,
            prompt=torch.tensor(tokens),
            max_new_tokens=self._max_new_tokens,
            sampling=SamplingParams(
                self._sampling.temperature,
                self._sampling.top_k,
                self._sampling.top_p,
                self._sampling.seed + self._next_id,
            ),
        )
        self._open[request.id] = (prompt, messages, turn)
        self._next_id += 1
        return request

    def asked(self, request: int) -> tuple[Prompt, int]:
        """Return the prompt of a request that is not completed yet, and its turn, counted from 0."""
        prompt, _, turn = self._open[request]
        return prompt, turn

    def completed(self, completion: Completion) -> str:
        """Note an answer, queue the next turn of its conversation, and return the conversation's domain."""
        prompt, messages, turn = self._open.pop(completion.request.id)
        if turn < len(prompt.follow_ups):
            answer = str(self._tokenizer.decode(completion.tokens, skip_special_tokens=True))
            messages = [
                *messages,
                {"role": "assistant", "content": answer},
                {"role": "user", "content": prompt.follow_ups[turn]},
            ]
            try:
                tokens = encode_chat(self._tokenizer, messages)
                reason = (
                    f"{len(tokens)} tokens do not fit" if len(tokens) + self._max_new_tokens > self._max_length else ""
                )
            except TemplateError as error:
                tokens, reason = [], f"the chat template refuses it: {error}"
            if not reason:
                self._waiting.append((prompt, messages, turn + 1, tokens))
            else:
                rest = len(prompt.follow_ups) - turn
                self.failed += [f"prompt {prompt.id!r}, turn {turn + 2}: {reason}"] * rest
        return prompt.domain

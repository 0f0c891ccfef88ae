"""Prompts to requests: chat template, token budget and seeds, and the follow-up turns of a conversation."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.models.loading import encode_chat
from aurora_rl.workload.traffic import Prompt, TrafficError


def turn_seed(seed: int, turn: int) -> int:
    """Seed of a turn: the conversation's own at the first turn, and 63 bits of BLAKE2b of "seed/turn" at later ones.

    It depends on nothing else, so that no turn's text depends on which requests ended before it was asked.

    Args:
        seed: Seed of the conversation, ``0 <= seed < 2**63``.
        turn: Number of the turn, 0 for the first.

    Example:
        >>> turn_seed(5, 0), turn_seed(5, 1) == turn_seed(5, 1), turn_seed(5, 1) == turn_seed(5, 2)
        (5, True, False)
    """
    if not turn:
        return seed
    return int.from_bytes(hashlib.blake2b(f"{seed}/{turn}".encode(), digest_size=8).digest()) % 2**63


@dataclass(frozen=True, slots=True)
class _Turn:
    """What is asked at one turn of a conversation, and the place of the conversation in the traffic."""

    prompt: Prompt
    index: int
    number: int
    messages: list[dict[str, str]]
    request: Request


class RequestQueue:
    """A source of requests: first turns in order, each follow-up after the answer to the turn before it.

    A request that cannot be served fails by name, with the turns after it, and the others are served. A first turn's id
    is the place of its prompt in the traffic; its seed is the prompt's own, or else the seed of ``sampling`` plus that
    place (modulo 2**63). Seeds of follow-ups come from :func:`turn_seed`.

    Args:
        prompts: Traffic to serve. What a prompt says about its budget, sampling and stop strings counts before the
            arguments below.
        tokenizer: Tokenizer of the target.
        vocab_size: Tokens that the target knows; ids outside of it cannot be served.
        max_new_tokens: Token budget of each completion.
        max_length: Tokens that a slot holds, prompt and completion.
        sampling: Temperature, top-k, top-p and seed.

    Attributes:
        total: First turns and follow-ups, the requests that will be served if none fails.
        failed: Messages of requests that could not be asked.

    Raises:
        TrafficError: No prompt can be served; says why the first cannot.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        max_new_tokens: int,
        max_length: int,
        sampling: SamplingParams,
    ) -> None:
        self._tokenizer, self._vocab_size, self._sampling = tokenizer, vocab_size, sampling
        self._max_new_tokens, self._max_length = max_new_tokens, max_length
        self._waiting: deque[_Turn] = deque()
        self._open: dict[int, _Turn] = {}
        self._next_id = len(prompts)
        self.total = sum(1 + len(prompt.follow_ups) for prompt in prompts)
        self.failed: list[str] = []
        for index, prompt in enumerate(prompts):
            self._ask(prompt, index, 0, [dict(message) for message in prompt.messages], index)
        if self.failed and not self._waiting:
            raise TrafficError(f"none of the prompts can be served ({len(prompts)}); the first: {self.failed[0]}")

    def first_prompts(self, count: int) -> list[list[int]]:
        """Token ids of the first prompts, for the day-0 draft vocabulary."""
        return [turn.request.prompt.tolist() for turn in list(self._waiting)[:count]]

    def __call__(self) -> Request | None:
        """The next request, None where none waits."""
        if not self._waiting:
            return None
        turn = self._waiting.popleft()
        self._open[turn.request.id] = turn
        return turn.request

    def asked(self, request: int) -> tuple[Prompt, int]:
        """Return the prompt of a request that is not completed yet, and its turn, counted from 0."""
        turn = self._open[request]
        return turn.prompt, turn.number

    def completed(self, completion: Completion) -> str:
        """Note an answer, queue the next turn of its conversation, and return the conversation's domain."""
        turn = self._open.pop(completion.request.id)
        prompt = turn.prompt
        if turn.number < len(prompt.follow_ups):
            answer = str(self._tokenizer.decode(completion.tokens, skip_special_tokens=True))
            messages = [
                *turn.messages,
                {"role": "assistant", "content": answer},
                {"role": "user", "content": prompt.follow_ups[turn.number]},
            ]
            self._ask(prompt, turn.index, turn.number + 1, messages, self._next_id)
            self._next_id += 1
        return prompt.domain

    def refused(self, request: Request, reason: str) -> None:
        """Note that the engine refused a request; the later turns of its conversation fail with it."""
        turn = self._open.pop(request.id)
        self._fail(turn.prompt, turn.number, reason)

    def _ask(self, prompt: Prompt, index: int, number: int, messages: list[dict[str, str]], id: int) -> None:
        """Queue a turn, or note why it cannot be asked."""
        try:
            request = self._request(prompt, index, number, messages, id)
        except ValueError as error:
            self._fail(prompt, number, str(error))
        else:
            self._waiting.append(_Turn(prompt, index, number, messages, request))

    def _fail(self, prompt: Prompt, number: int, reason: str) -> None:
        turns_left = len(prompt.follow_ups) - number + 1
        self.failed += [f"prompt {prompt.id!r}, turn {number + 1}: {reason}"] * turns_left

    def _request(self, prompt: Prompt, index: int, number: int, messages: list[dict[str, str]], id: int) -> Request:
        """The request of a turn; raises ValueError with what is wrong with it."""
        try:
            tokens = encode_chat(self._tokenizer, messages)
        except Exception as error:  # a template is a program of the model's, which may fail in any way
            reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
            name = self._tokenizer.name_or_path
            raise ValueError(f"the chat template of model {name!r} refuses the conversation: {reason}") from error
        if not tokens:
            raise ValueError("the prompt has no tokens; say something in its messages")
        outside = next((token for token in tokens if not 0 <= token < self._vocab_size), None)
        if outside is not None:
            raise ValueError(
                f"the tokenizer gives token {outside}, and the model knows 0..{self._vocab_size - 1}; take the model's "
                "own tokenizer, or leave out the text that it has no token for"
            )
        budget = self._max_new_tokens if prompt.max_tokens is None else prompt.max_tokens
        if len(tokens) + budget > self._max_length:
            key = "max_new_tokens" if prompt.max_tokens is None else "max_tokens"
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; with {key}={budget} that exceeds engine.max_length="
                f"{self._max_length}; shorten it, or raise engine.max_length up to the model's context"
            )
        settings = {"seed": (self._sampling.seed + index) % 2**63, **prompt.sampling}
        sampling = replace(self._sampling, **settings)
        seed = turn_seed(sampling.seed, number)
        sampling = replace(sampling, seed=seed, max_tokens=budget, stop=prompt.stop)
        return Request(id, torch.tensor(tokens), sampling)

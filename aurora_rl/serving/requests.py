"""Prompts to requests: chat template, token budget and seeds, and the follow-up turns of a conversation."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.models.detokenizer import detokenize
from aurora_rl.models.loading import encode_chat
from aurora_rl.sampling_params import seed_after
from aurora_rl.telemetry.log import JsonLines
from aurora_rl.workload.traffic import ChatMessage, Prompt, TrafficError


def turn_seed(seed: int, turn: int) -> int:
    """Return the seed of a turn: the conversation's own at the first, and 63 bits of BLAKE2b of "seed/turn" later.

    It depends on nothing else, so that no turn's text depends on which requests ended before it was asked.

    Args:
        seed: Seed of the conversation.
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
    """One turn of a conversation: its number, what is said so far, and the conversation's place in the traffic."""

    prompt: Prompt
    index: int
    number: int
    messages: Sequence[ChatMessage]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[ChatMessage], vocab_size: int) -> list[int]:
    """Return the token ids of a conversation, as the model is asked to go on with it.

    Args:
        tokenizer: Tokenizer of the target.
        messages: The conversation.
        vocab_size: Tokens that the target knows.

    Raises:
        ValueError: The chat template refuses the conversation, it has no tokens, or one that the target lacks.
    """
    try:
        tokens = encode_chat(tokenizer, messages)
    except Exception as error:  # a template is a program of the model's, which may fail in any way
        reason = str(error) if isinstance(error, TemplateError) else f"{type(error).__name__}: {error}"
        name = tokenizer.name_or_path
        raise ValueError(f"the chat template of model {name!r} refuses the conversation: {reason}") from error
    if not tokens:
        raise ValueError("the prompt has no tokens; say something in its messages")
    outside = next((token for token in tokens if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"the tokenizer gives token {outside}, and the model knows 0..{vocab_size - 1}; take the model's "
            "own tokenizer, or leave out the text that it has no token for"
        )
    return tokens


class RequestSource(Protocol):
    """Where a server's requests come from, and what becomes of them goes."""

    def __call__(self) -> Request | None:
        """Return the next request; None where none waits."""

    def completed(self, completion: Completion) -> str:
        """Note an answer, and return its domain."""

    def refused(self, request: Request, reason: str) -> None:
        """Note that a request cannot be served."""


class RequestQueue:
    """A source of requests: first turns in order, each follow-up after the answer to the turn before it.

    A request that cannot be served fails by name, with the turns after it, and the others are served. A first turn's id
    is the place of its prompt in the traffic. Its seed is the prompt's own, or else that of ``sampling_params`` plus
    that place (:func:`~aurora_rl.sampling_params.seed_after`), so a run gives the same texts again. Seeds of follow-ups
    come from :func:`turn_seed`. Where ``sampling_params`` has no seed, every request draws its own.

    Args:
        prompts: Traffic to serve. What a prompt says of its sampling, budget and stop strings counts before
            ``sampling_params``.
        tokenizer: Tokenizer of the target.
        vocab_size: Tokens that the target knows; ids outside of it cannot be served.
        max_length: Tokens that a slot holds, prompt and completion.
        sampling_params: Temperature, min-p, top-k, top-p, seed and token budget.

    Attributes:
        total: First turns and follow-ups, the requests that will be served if none fails.
        answered: Requests that have completed.
        failed: Messages of requests that could not be asked.
        answers: File that gets a line for each completion and each failed turn, see :meth:`write_answers`; None without
            one.

    Raises:
        TrafficError: No prompt can be served; says why the first cannot.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        max_length: int,
        sampling_params: SamplingParams,
    ) -> None:
        self._tokenizer, self._sampling_params = tokenizer, sampling_params
        self._vocab_size, self._max_length = vocab_size, max_length
        self._waiting: deque[tuple[_Turn, Request]] = deque()
        self._open: dict[int, _Turn] = {}
        self._next_id = len(prompts)
        self.total = sum(1 + len(prompt.follow_ups) for prompt in prompts)
        self.answered = 0
        self.failed: list[str] = []
        self._unwritten: list[tuple[_Turn, str]] = []  # the first turn of a conversation that failed, and why
        self.answers: JsonLines | None = None
        for index, prompt in enumerate(prompts):
            self._ask(_Turn(prompt, index, 0, prompt.messages), index)
        if self.failed and not self._waiting:
            raise TrafficError(f"none of the prompts can be served ({len(prompts)}); the first: {self.failed[0]}")

    def first_prompts(self, count: int) -> list[list[int]]:
        """Return the token ids of the first prompts, for the day-0 draft vocabulary."""
        return [request.prompt.tolist() for _, request in list(self._waiting)[:count]]

    def write_answers(self, lines: JsonLines) -> None:
        """Write a line for each completion from now on, and for each turn that failed or will, as soon as it does."""
        self.answers = lines
        self._write_failed()

    @property
    def done(self) -> bool:
        """Whether every request was answered or has failed."""
        return not (self._waiting or self._open)

    def __call__(self) -> Request | None:
        """Return the next request; None if none waits."""
        if not self._waiting:
            return None
        turn, request = self._waiting.popleft()
        self._open[request.id] = turn
        return request

    def completed(self, completion: Completion) -> str:
        """Note an answer, queue the next turn of its conversation, and return the conversation's domain."""
        turn = self._open.pop(completion.request.id)
        self.answered += 1
        prompt = turn.prompt
        text = detokenize(self._tokenizer, completion.tokens.tolist(), completion.request.sampling_params.stop)
        if self.answers is not None:
            self.answers.append(
                request=completion.request.id,
                prompt=prompt.id,
                domain=prompt.domain,
                turn=turn.number + 1,
                text=text,
                finish_reason=completion.finish_reason,
                tokens=len(completion.tokens),
            )
        if turn.number < len(prompt.follow_ups):
            follow_up = {"role": "user", "content": prompt.follow_ups[turn.number]}
            messages = [*turn.messages, {"role": "assistant", "content": text}, follow_up]
            self._ask(replace(turn, number=turn.number + 1, messages=messages), self._next_id)
            self._next_id += 1
        return prompt.domain

    def refused(self, request: Request, reason: str) -> None:
        """Note that the engine refused a request; the later turns of its conversation fail with it."""
        self._fail(self._open.pop(request.id), reason)

    def _ask(self, turn: _Turn, id: int) -> None:
        """Queue a turn, or note why it cannot be asked."""
        try:
            self._waiting.append((turn, self._request(turn, id)))
        except ValueError as error:
            self._fail(turn, str(error))

    def _fail(self, turn: _Turn, reason: str) -> None:
        turns_left = len(turn.prompt.follow_ups) - turn.number + 1
        self.failed += [f"prompt {turn.prompt.id!r}, turn {turn.number + 1}: {reason}"] * turns_left
        self._unwritten.append((turn, reason))
        self._write_failed()

    def _write_failed(self) -> None:
        """Write a line for each turn that failed, with its error in place of a text."""
        if self.answers is None:
            return
        for turn, reason in self._unwritten:
            prompt = turn.prompt
            for number in range(turn.number, len(prompt.follow_ups) + 1):
                self.answers.append(prompt=prompt.id, domain=prompt.domain, turn=number + 1, error=reason)
        self._unwritten.clear()

    def _request(self, turn: _Turn, id: int) -> Request:
        """Return the request of a turn; raise ValueError with what is wrong with it."""
        prompt = turn.prompt
        tokens = prompt_tokens(self._tokenizer, turn.messages, self._vocab_size)
        budget = self._sampling_params.token_budget if prompt.max_tokens is None else prompt.max_tokens
        if len(tokens) + budget > self._max_length:
            key = "max_new_tokens" if prompt.max_tokens is None else "max_tokens"
            raise ValueError(
                f"the prompt has {len(tokens)} tokens; with {key}={budget} that exceeds engine.max_length="
                f"{self._max_length}; shorten it, or raise engine.max_length up to the model's context"
            )
        first = self._sampling_params.seed
        seed = prompt.sampling.get("seed", None if first is None else seed_after(first, turn.index))
        seed = None if seed is None else turn_seed(seed, turn.number)
        settings = {**prompt.sampling, "seed": seed, "max_tokens": budget, "stop": prompt.stop}
        sampling_params = replace(self._sampling_params, **settings)
        return Request(
            id, torch.tensor(tokens), sampling_params, prompt.speculative, prompt.learn, cache_salt=prompt.cache_salt
        )

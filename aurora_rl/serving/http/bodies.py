"""Bodies of answers: choices, pieces of a stream, log-probabilities, usage, and what became of the drafts."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from aurora_rl.envs import Completion
from aurora_rl.envs.request import TokenLogprobs
from aurora_rl.models.detokenizer import detokenize
from aurora_rl.serving.async_engine import Job

_LEAST = -9999.0  # OpenAI's value for a log-probability that JSON cannot write
_BATCH = 16  # entries of a list that are encoded at once; of tokens with 20 alternatives that takes about a millisecond
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def encoded(value: Any) -> Iterator[str]:
    """Yield the JSON of a value in parts. No other thread of the interpreter runs while one of them is encoded.

    Example:
        >>> list(encoded({"a": {"b": None}}))
        ['{"a":', '{"b":', 'null', '}', '}']
    """
    if isinstance(value, dict) and value:
        before = "{"
        for name, each in value.items():
            yield f"{before}{_JSON.encode(name)}:"
            yield from encoded(each)
            before = ","
        yield "}"
    elif isinstance(value, list) and len(value) > _BATCH:
        for begin in range(0, len(value), _BATCH):
            yield ("," if begin else "[") + _JSON.encode(value[begin : begin + _BATCH])[1:-1]
        yield "]"
    else:
        yield _JSON.encode(value)


def draft_metrics(
    histograms: Sequence[Sequence[int]], *, num_drafted: int, num_spec_tokens: int, drafter_version: int
) -> dict[str, Any]:
    """Return counts and rates of an answer's drafts, and the drafter's version, under vLLM's names.

    Args:
        histograms: Speculative steps of each choice, counted by the number of drafts that they accepted.
        num_drafted: Drafted tokens of all choices.
        num_spec_tokens: Longest drafted path, in tokens.
        drafter_version: Version of the drafter's weights.

    Returns:
        The fields "speculative_decoding" and "drafter_version" of the answer's metrics. Rates are 0 without drafts, and
        the mean acceptance length is 1.0 without steps.

    Example:
        >>> told = draft_metrics([[1, 2], [0, 1]], num_drafted=8, num_spec_tokens=2, drafter_version=3)
        >>> told["speculative_decoding"]["acceptance_histogram"], told["speculative_decoding"]["mean_acceptance_length"]
        ([1, 3, 0], 1.75)
    """
    longest = max([num_spec_tokens, *(len(each) - 1 for each in histograms)])
    histogram = [sum(each[accepted] for each in histograms if accepted < len(each)) for accepted in range(longest + 1)]
    steps, accepted = sum(histogram), sum(count * rounds for count, rounds in enumerate(histogram))
    return {
        "speculative_decoding": {
            "mean_acceptance_length": 1 + accepted / steps if steps else 1.0,
            "draft_acceptance_rate": accepted / num_drafted if num_drafted else 0.0,
            "acceptance_histogram": histogram,
            "num_spec_steps": steps,
            "num_accepted_draft_tokens": accepted,
            "num_draft_tokens": num_drafted,
            "num_spec_tokens": longest,
        },
        "drafter_version": drafter_version,
    }


class Bodies(ABC):
    """The bodies of the answer to one request.

    ``spell`` returns the text and the bytes of a token; see :func:`~aurora_rl.models.detokenizer.token_bytes`.
    """

    prefix, kind, chunk_kind = "", "", ""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        spell: Callable[[int], tuple[str, list[int] | None]],
        num_spec_tokens: Callable[[], int],
        drafter_version: Callable[[], int],
    ) -> None:
        self._tokenizer, self._spell = tokenizer, spell
        self._num_spec_tokens, self._drafter_version = num_spec_tokens, drafter_version
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(16)}", "created": int(time.time()), "model": model}

    def part(self, index: int, jobs: Sequence[Job], completions: Sequence[Completion]) -> bytes:
        """Return the part with one choice of an answer that is not streamed. The parts of all make up its JSON."""
        before = "," if index else f'{_JSON.encode({**self._head, "object": self.kind})[:-1]},"choices":['
        text = before + "".join(encoded(self._choice(index, completions[index])))
        if index == len(completions) - 1:
            end = {"usage": self.usage(jobs, completions), "metrics": self.metrics(completions)}
            text += f"],{_JSON.encode(end)[1:]}"
        return text.encode()

    def chunk(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None = None,
        *,
        first: bool = False,
        finish_reason: str | None = None,
    ) -> dict[str, Any]:
        """Return a piece of a stream: new text of a choice, and the log-probabilities of its tokens."""
        delta = self._delta(text, first)
        choice = {"index": index, **delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}

    def usage_chunk(self, jobs: Sequence[Job], completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the last piece of a stream that was asked for its usage."""
        end = {"usage": self.usage(jobs, completions), "metrics": self.metrics(completions)}
        return {**self._head, "object": self.chunk_kind, "choices": [], **end}

    @staticmethod
    def usage(jobs: Sequence[Job], completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the tokens of an answer; the prompt of several choices is counted once, as it was first read."""
        prompt = sum({id(job.prompt): len(job.prompt) for job in jobs}.values())
        completion = sum(len(each.tokens) for each in completions)
        cached: dict[int, int] = {}
        for job, each in zip(jobs, completions, strict=True):
            cached[id(job.prompt)] = min(each.cached_tokens, cached.get(id(job.prompt), each.cached_tokens))
        return {
            "prompt_tokens": prompt,
            "prompt_tokens_details": {"cached_tokens": sum(cached.values())},
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def metrics(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return what became of the drafts of all choices together, under vLLM's names."""
        drafts = [each.drafts for each in completions]
        return draft_metrics(
            [each.histogram for each in drafts],
            num_drafted=sum(each.num_drafted for each in drafts),
            num_spec_tokens=self._num_spec_tokens(),
            drafter_version=self._drafter_version(),
        )

    def _choice(self, index: int, completion: Completion) -> dict[str, Any]:
        tokens, found = completion.tokens.tolist(), completion.logprobs
        return {
            "index": index,
            **self._message(detokenize(self._tokenizer, tokens, completion.request.sampling_params.stop)),
            "logprobs": None if found is None else self.logprobs(tokens, found),
            "finish_reason": completion.finish_reason,
        }

    @abstractmethod
    def _message(self, text: str) -> dict[str, Any]:
        """The text of a choice of an answer that is not streamed."""

    @abstractmethod
    def _delta(self, text: str, first: bool) -> dict[str, Any]:
        """The new text of a choice of a stream."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprobs], before: int = 0) -> dict[str, Any]:
        """Return the log-probabilities of tokens, after ``before`` characters of the choice's tokens."""


class ChatBodies(Bodies):
    """The bodies of ``/v1/chat/completions``."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    @override
    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    @override
    def _delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": text} if first else {"content": text}}

    @override
    def logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprobs], before: int = 0) -> dict[str, Any]:
        content = [
            {**self._token(token, each.logprob), "top_logprobs": [self._token(*pair) for pair in each.top]}
            for token, each in zip(tokens, found, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text, spelt = self._spell(token)
        return {"token": text, "logprob": max(logprob, _LEAST), "bytes": spelt}


class TextBodies(Bodies):
    """The bodies of ``/v1/completions``."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    @override
    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    @override
    def _delta(self, text: str, first: bool) -> dict[str, Any]:
        return {"text": text}

    @override
    def logprobs(self, tokens: Sequence[int], found: Sequence[TokenLogprobs], before: int = 0) -> dict[str, Any]:
        texts = [self._token(token) for token in tokens]
        offsets, at = [], before
        for text in texts:
            offsets.append(at)
            at += len(text)
        tops = [
            {text: max(each.logprob, _LEAST), **{self._token(token): max(high, _LEAST) for token, high in each.top}}
            for text, each in zip(texts, found, strict=True)
        ]
        own = [max(each.logprob, _LEAST) for each in found]
        return {"tokens": texts, "token_logprobs": own, "top_logprobs": tops, "text_offset": offsets}

    def _token(self, token: int) -> str:
        return self._spell(token)[0]

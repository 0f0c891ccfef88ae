"""Bodies of requests, checked: every field is honoured, harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

from aurora_rl.serving.http.errors import ApiError
from aurora_rl.workload.request_fields import FieldError, check_fields
from aurora_rl.workload.request_values import (
    BUDGETS,
    SAMPLING,
    ChatMessage,
    as_json,
    boolean_field,
    cache_salt_field,
    chat_messages,
    integer_field,
    missing,
    parse_json,
    sampling_fields,
    string_field,
    wrong,
)

_MAX_N, _MAX_LOGPROBS = 128, 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Fields that chats and plain completions share. A null field counts as absent, except ``max_tokens``."""

    NAMES: ClassVar[tuple[str, ...]] = (
        *("model", "stream", "stream_options", "n", "logprobs", "speculative", "learn", "cache_salt"),
        *BUDGETS,
        *SAMPLING,
    )

    model: str | None  # name of the served model
    stream: bool
    include_usage: bool  # at the end of a stream
    n: int  # choices for each prompt
    # What the request says of its SamplingParams, by their names. The seed is the first choice's; others count on.
    sampling: Mapping[str, Any]
    budget_name: str  # field that names the token budget
    # Token budget if neither the request nor the configuration names one; None takes what the context leaves.
    default_budget: int | None = None
    speculative: bool | None  # None if the body does not say
    learn: bool | None  # None if the body does not say
    cache_salt: str | None


def _generation(fields: Mapping[str, Any], logprobs: int | None) -> dict[str, Any]:
    """Return the arguments of :class:`Generation`."""
    stream = boolean_field(fields, "stream") or False
    sampling = sampling_fields(fields)
    return {
        "model": string_field(fields, "model"),
        "stream": stream,
        "include_usage": _include_usage(fields.get("stream_options"), stream),
        "n": integer_field(fields, "n", 1, _MAX_N) or 1,
        "sampling": sampling if logprobs is None else {**sampling, "logprobs": logprobs},
        "budget_name": next((name for name in reversed(BUDGETS) if fields.get(name) is not None), BUDGETS[0]),
        "speculative": boolean_field(fields, "speculative"),
        "learn": boolean_field(fields, "learn"),
        "cache_salt": cache_salt_field(fields),
    }


def _include_usage(options: Any, stream: bool) -> bool:
    if options is None:
        return False
    if not isinstance(options, dict):
        raise wrong("stream_options", options, "give an object")
    if not stream:
        raise FieldError("stream_options needs stream=true", "stream_options")
    # Nothing is padded against eavesdroppers, whatever they say of obfuscation.
    known = check_fields(
        options, ("include_usage",), where="stream_options.", harmless=("include_obfuscation",), neutral={}
    )
    return boolean_field(known, "include_usage", "stream_options.") or False


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatCompletionBody(Generation):
    """Body of ``/v1/chat/completions``."""

    NAMES = (*Generation.NAMES, "messages", "top_logprobs")

    messages: tuple[ChatMessage, ...]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Check the fields of a body."""
        messages = chat_messages(fields.get("messages"))
        logprobs, top = boolean_field(fields, "logprobs"), integer_field(fields, "top_logprobs", 0, _MAX_LOGPROBS)
        if top and not logprobs:
            raise FieldError("top_logprobs needs logprobs=true", "top_logprobs")
        return cls(messages=messages, **_generation(fields, (top or 0) if logprobs else None))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionBody(Generation):
    """Body of ``/v1/completions``."""

    NAMES = (*Generation.NAMES, "prompt")

    prompts: list[str] | list[list[int]]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Check the fields of a body."""
        prompts = _prompts(fields.get("prompt"))
        budget = None if "max_tokens" in fields else 16
        common = _generation(fields, integer_field(fields, "logprobs", 0, _MAX_LOGPROBS))
        return cls(prompts=prompts, default_budget=budget, **common)


def _prompts(value: Any) -> list[str] | list[list[int]]:
    if value is None:
        raise missing("prompt")
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return value
    if isinstance(value, list) and value and all(_is_ids(each) for each in value):
        return value
    fix = "give a string, a list of strings, a list of token ids, or a list of lists of token ids"
    raise wrong("prompt", value, fix)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


@dataclass(frozen=True, slots=True)
class Tokenize:
    """Body of ``/tokenize``: a text or a conversation."""

    NAMES: ClassVar[tuple[str, ...]] = ("model", "prompt", "messages", "add_special_tokens", "return_token_strs")

    model: str | None
    prompt: str | None  # None if there are messages
    messages: tuple[ChatMessage, ...] | None  # None if there is a text
    add_special_tokens: bool  # whether a text gets those that the tokenizer begins or ends it with
    return_token_strs: bool  # whether each token is also told as a string

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Check the fields of a body."""
        prompt, messages = string_field(fields, "prompt"), fields.get("messages")
        if (prompt is None) == (messages is None):
            raise FieldError("give either prompt or messages", "prompt")
        return cls(
            string_field(fields, "model"),
            prompt,
            None if messages is None else chat_messages(messages),
            boolean_field(fields, "add_special_tokens") is not False,
            boolean_field(fields, "return_token_strs") or False,
        )


@dataclass(frozen=True, slots=True)
class Detokenize:
    """Body of ``/detokenize``: token ids, and the name of the served model."""

    NAMES: ClassVar[tuple[str, ...]] = ("model", "tokens")

    model: str | None
    tokens: list[int]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        """Check the fields of a body."""
        if (tokens := fields.get("tokens")) is None:
            raise missing("tokens")
        if not isinstance(tokens, list) or (tokens and not _is_ids(tokens)):
            raise wrong("tokens", tokens, "give a list of token ids")
        return cls(string_field(fields, "model"), tokens)


class _Schema(Protocol):
    NAMES: ClassVar[tuple[str, ...]]

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self: ...


T = TypeVar("T", bound=_Schema)


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, or raise ApiError with status 400 if it is none."""
    try:
        value = parse_json(body)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {as_json(value)}", code="invalid_json")
    return value


def parse(body: bytes, schema: type[T]) -> T:
    """Return the checked body of a request.

    Raises:
        ApiError: Status 400, for a body that is no object of JSON.
        FieldError: The message names the field, its value, and the fix.

    Example:
        >>> parse(b'{"tokens": [3, 4], "user": "me"}', Detokenize).tokens
        [3, 4]
    """
    return schema.of(check_fields(json_object(body), schema.NAMES))

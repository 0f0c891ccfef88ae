"""Bodies of requests, checked: every field is honoured, harmless, or refused by name."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import from_json

from aurora_rl.serving.http.errors import ApiError
from aurora_rl.serving.http.fields import check_fields
from aurora_rl.workload.request_fields import check_cache_salt

_MAX_N, _MAX_STOPS = 128, 16
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What clients send back of an answer that they got; templates are not given it.
_EMPTY_OF_MESSAGE: dict[str, tuple[Any, ...]] = {
    name: ([], {}, "")
    for name in ("refusal", "annotations", "audio", "tool_calls", "function_call", "reasoning", "reasoning_content")
}


def _stops(value: object) -> object:
    strings = [value] if isinstance(value, str) else value
    if strings is None:
        return ()
    if not isinstance(strings, list) or not all(isinstance(each, str) and each for each in strings):
        raise ValueError("give a string, or a list of strings, none of them empty")
    if len(strings) > _MAX_STOPS:
        raise ValueError(f"give at most {_MAX_STOPS} strings, got {len(strings)}")
    return tuple(strings)


def _content(value: object) -> object:
    """Text of a message: a string, null, or parts of type text, which are joined by newlines as in vLLM."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise ValueError("give a string, or a list of parts of type text")
    texts = []
    for index, part in enumerate(value):
        if not isinstance(part, dict):
            raise ValueError(f"part {index} is no object; give {{'type': 'text', 'text': ...}}")
        if part.get("type") != "text":
            raise ValueError(f"part {index} is of type {part.get('type')!r:.50}, and this server takes text only")
        if not isinstance(part.get("text"), str) or part.keys() > {"type", "text"}:
            raise ValueError(f"part {index} must have the keys 'type' and 'text' alone, and a string in 'text'")
        texts.append(part["text"])
    return "\n".join(texts)


def _role(value: object) -> object:
    if value in ("tool", "function"):
        raise ValueError(f"messages of role {value!r} are not supported by this server, as tools are not")
    if not isinstance(value, str) or value not in _ROLES:
        raise ValueError(f"give one of {', '.join(_ROLES)}")
    return _ROLES[value]


def _messages(value: object) -> object:
    """Check the keys of messages."""
    if not isinstance(value, list):
        return value
    checked = []
    for index, message in enumerate(value):
        where = f"messages[{index}]."
        if isinstance(message, dict):
            message = check_fields(
                message, ("role", "content"), where=where, harmless=("name",), neutral=_EMPTY_OF_MESSAGE
            )
            if message.get("content") is None and message.get("role") != "assistant":
                raise ApiError(400, f"{where}content is missing", param=f"{where}content", code="missing_field")
        checked.append(message)
    return checked


def _prompts(value: object) -> object:
    """Return a list of prompts, each a string or a list of ids."""
    if isinstance(value, str) or _is_ids(value):
        return [value]
    if isinstance(value, list) and value and (_all_strings(value) or all(_is_ids(each) for each in value)):
        return value
    raise ValueError("give a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _all_strings(value: list[Any]) -> bool:
    return all(isinstance(each, str) for each in value)


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Message(_Model):
    """One message of a chat.

    Attributes:
        role: "system", "user" or "assistant"; "developer" is taken for "system".
        content: Its text.
    """

    role: Annotated[str, BeforeValidator(_role)]
    content: Annotated[str, BeforeValidator(_content)] = ""


class StreamOptions(_Model):
    """Options of a stream.

    Attributes:
        include_usage: Whether a last chunk brings the usage.
        include_obfuscation: Taken from OpenAI's clients; nothing is padded.
    """

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class Generation(_Model):
    """What chats and plain completions have in common; null is as good as nothing everywhere.

    Attributes:
        model: Name of the served model.
        stream: Whether the answer comes in pieces.
        stream_options: Options of the stream.
        max_tokens: Token budget; None takes what the context leaves.
        temperature: Divides the logits.
        top_p: Mass of the likeliest tokens that are kept.
        top_k: Number of the likeliest tokens that are kept; 0 or -1 keeps all.
        seed: Seed of the first choice; the next ones take the numbers after it. None draws one.
        stop: Strings that end the text.
        n: Choices for each prompt.
        speculative: Whether drafts are verified for it.
        learn: Whether the learner may see it.
        cache_salt: Key of what requests share, see :class:`~aurora_rl.envs.Request`.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stops)] = ()
    n: Annotated[int, Field(ge=1, le=_MAX_N)] | None = None
    speculative: bool | None = None
    learn: bool | None = None
    cache_salt: Annotated[str | None, BeforeValidator(check_cache_salt)] = None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens that are listed with each token's log-probability; None if none is asked for."""
        raise NotImplementedError

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatCompletion(Generation):
    """Body of ``/v1/chat/completions``.

    Attributes:
        messages: The conversation.
        max_completion_tokens: Token budget, before ``max_tokens``.
        logprobs: Whether log-probabilities of the tokens are wanted.
        top_logprobs: Likeliest tokens to list with each.
    """

    messages: Annotated[list[Message], Field(min_length=1), BeforeValidator(_messages)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens that are listed with each token's log-probability; None if none is asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Generation):
    """Body of ``/v1/completions``.

    Attributes:
        prompt: Prompts, each a text or token ids.
        max_tokens: Token budget, 16 if it is left out; null takes what the context leaves.
        logprobs: Likeliest tokens to list with each, at most 20; None for no log-probabilities.
    """

    prompt: Annotated[list[str] | list[list[int]], BeforeValidator(_prompts)]
    max_tokens: int | None = 16
    logprobs: int | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens that are listed with each token's log-probability; None if none is asked for."""
        return self.logprobs


class Tokenize(_Model):
    """Body of ``/tokenize``: a prompt or messages.

    Attributes:
        model: Name of the served model.
        prompt: A text.
        messages: A conversation, in the place of a text.
        add_special_tokens: Whether the text gets the special tokens that the tokenizer begins or ends a text with.
        return_token_strs: Whether each token is also told as a string.
    """

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, BeforeValidator(_messages)] = None
    add_special_tokens: bool = True
    return_token_strs: bool | None = None


class Detokenize(_Model):
    """Body of ``/detokenize``.

    Attributes:
        model: Name of the served model.
        tokens: Token ids.
    """

    model: str | None = None
    tokens: list[int]


def json_object(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body, or raise ApiError with status 400 if it is none."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json")
    return value


T = TypeVar("T", bound=_Model)


def parse(body: bytes, schema: type[T]) -> T:
    """Return the checked body of a request.

    Raises:
        ApiError: Status 400; the message names the field, what is wrong with it, and the value.

    Example:
        >>> parse(b'{"tokens": [3, 4], "user": "me"}', Detokenize).tokens
        [3, 4]
    """
    fields = check_fields(json_object(body), schema.model_fields)
    try:
        return schema.model_validate(fields)
    except ValidationError as error:
        raise _refusal(error) from error


def _refusal(error: ValidationError) -> ApiError:
    """Name the first wrong field."""
    first = error.errors(include_url=False)[0]
    place = ""
    for part in first["loc"]:
        place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
    if first["type"] == "missing":
        return ApiError(400, f"{place} is missing", param=place, code="missing_field")
    reason = str(first.get("ctx", {}).get("error") or first["msg"])
    return ApiError(400, f"{place} is {_shown(first['input'])}: {reason}", param=place, code="invalid_value")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

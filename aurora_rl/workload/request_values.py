"""Values of request fields, checked alike in a body and in a line of a traffic file."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from aurora_rl.sampling_params import SamplingParams
from aurora_rl.workload.request_fields import FieldError, check_fields

ChatMessage = Mapping[str, str]
"""One message of a chat: "role", "content", and "name" if it has one."""

BUDGETS = ("max_tokens", "max_completion_tokens")
SAMPLING: Mapping[str, tuple[tuple[type, ...], str]] = {
    **dict.fromkeys(("temperature", "top_p", "min_p"), ((int, float), "give a number")),
    **dict.fromkeys(("top_k", "seed"), ((int,), "give an integer")),
    "stop": ((str, list), "give a string, or a list of strings"),
    "ignore_eos": ((bool,), "give true or false"),
}
"""Types of the fields that say how tokens are drawn and what ends them, and what to give in the place of others."""
_MAX_STOPS, _LONGEST_STOP = 16, 1000
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
# What clients send back of an answer that they got; templates are not given it.
_EMPTY_OF_MESSAGE: dict[str, tuple[Any, ...]] = {
    name: ([], {}, "")
    for name in ("refusal", "annotations", "audio", "tool_calls", "function_call", "reasoning", "reasoning_content")
}


def parse_json(data: bytes) -> Any:
    r"""Return a value of JSON, in UTF-8.

    Raises:
        ValueError: The data is not JSON, or has a text that no tokenizer takes.

    Example:
        >>> parse_json(b'{"n": [1, 2.5]}')
        {'n': [1, 2.5]}
    """
    text = data.decode("utf-8-sig")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\u" in text:
            check_texts(value)
    except RecursionError:
        raise ValueError("nested too deeply to read") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None
    except ValueError as error:
        if "digits" not in str(error):
            raise
        raise ValueError("an integer has too many digits to be read; write a smaller one") from None
    return value


def check_texts(value: Any) -> None:
    """Raise ValueError if a text in a value of JSON holds half a surrogate pair.

    Example:
        >>> check_texts({"role": "user", "content": "hi"})
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"a text has {half!r}, half a surrogate pair, which no tokenizer takes; remove it") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON; write a number or null")


class _Json(reprlib.Repr):
    """A :class:`reprlib.Repr` for values of JSON."""

    def repr_bool(self, value: bool, level: int) -> str:
        return "true" if value else "false"

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"

    @override
    def repr_str(self, x: str, level: int) -> str:
        half = (self.maxstring - len("...")) // 2
        short = x if len(x) <= self.maxstring else f"{x[:half]}...{x[-half:]}"
        return json.dumps(short, ensure_ascii=not short.isprintable())


as_json = _Json().repr
"""Return a value as JSON for a message; what is long is cut."""


def wrong(place: str, value: Any, fix: str) -> FieldError:
    """Return the error of a value at a place of the request; ``fix`` says what to give instead.

    Example:
        >>> str(wrong("n", {"a": [True, None, "x"]}, "give an integer"))
        'n is {"a": [true, null, "x"]}; give an integer'
    """
    return FieldError(f"{place} is {as_json(value)}; {fix}", place)


def missing(place: str) -> FieldError:
    """Return the error of a field that is not there."""
    return FieldError(f"{place} is missing", place, "missing_field")


def boolean_field(fields: Mapping[str, Any], name: str, where: str = "") -> bool | None:
    """Return a field that is true or false; None if it is null or left out."""
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise wrong(f"{where}{name}", value, "give true or false")
    return value


def integer_field(fields: Mapping[str, Any], name: str, least: int, most: float = math.inf) -> int | None:
    """Return a field that is an integer from ``least`` to ``most``; None if it is null or left out."""
    value = fields.get(name)
    if value is not None and (type(value) is not int or not least <= value <= most):
        raise wrong(name, value, f"give an integer >= {least}" + (f" and <= {most}" if most < math.inf else ""))
    return value


def string_field(fields: Mapping[str, Any], name: str, where: str = "") -> str | None:
    """Return a field that is a string; None if it is null or left out."""
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise wrong(f"{where}{name}", value, "give a string")
    return value


def cache_salt_field(fields: Mapping[str, Any]) -> str | None:
    """Return the field ``cache_salt``, with vLLM's bounds; None if it is null or left out."""
    value = fields.get("cache_salt")
    if value is None or (isinstance(value, str) and 1 <= len(value) <= 128 and not set(value) & set("@/\\\0")):
        return value
    raise wrong("cache_salt", value, r"give a string of 1 to 128 characters, none of them @, /, \ or NUL")


def budget_field(fields: Mapping[str, Any]) -> int | None:
    """Return the most new tokens that a request asks for, by either name of :data:`BUDGETS`; None if by neither.

    Raises:
        FieldError: A value is no integer of at least 1, or the two differ.
    """
    budgets = {name: budget for name in BUDGETS if (budget := integer_field(fields, name, 1)) is not None}
    if len(set(budgets.values())) > 1:
        raise FieldError(f"{' and '.join(budgets)} differ; give one of them", BUDGETS[-1])
    return next(iter(budgets.values()), None)


def sampling_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a request says of its :class:`~aurora_rl.sampling_params.SamplingParams`, by their names.

    It says it in the fields :data:`BUDGETS` and :data:`SAMPLING`.

    Raises:
        FieldError: A value is out of range, or the two budgets differ.

    Example:
        >>> sampling_fields({"max_completion_tokens": 8, "top_k": -1, "seed": None, "stop": "END"})
        {'top_k': -1, 'stop': 'END', 'max_tokens': 8}
    """
    named = {name: fields[name] for name in SAMPLING if fields.get(name) is not None}
    for name, value in named.items():
        kinds, fix = SAMPLING[name]
        if type(value) not in kinds:  # true is an int to Python
            raise wrong(name, value, fix)
    stop = named.get("stop")
    if isinstance(stop, list) and len(stop) > _MAX_STOPS:
        raise FieldError(f"stop has {len(stop)} strings; give at most {_MAX_STOPS}", "stop")
    stops = [stop] if isinstance(stop, str) else stop or []
    for each in stops:
        if not isinstance(each, str) or not each:
            raise FieldError(f"stop has {as_json(each)}; give strings that are not empty", "stop")
    longest = max(map(len, stops), default=0)
    if longest > _LONGEST_STOP:  # it is looked for at every token
        raise FieldError(f"stop has a string of {longest} characters; give at most {_LONGEST_STOP}", "stop")
    if (budget := budget_field(fields)) is not None:
        named["max_tokens"] = budget
    try:
        SamplingParams(**named)
    except ValueError as error:  # its message begins with the field
        raise FieldError(str(error), str(error).split()[0]) from error
    return named


def chat_messages(value: Any, place: str = "messages", *, by: str = "this server") -> tuple[ChatMessage, ...]:
    """Return the messages of a chat as templates take them: texts by role.

    Whether a message may be empty is the template's to say. ``by`` does not support what messages may not have.

    Raises:
        FieldError: The first message that cannot be given to a template, by its place.

    Example:
        >>> chat_messages([{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}])
        ({'role': 'system', 'content': 'Be brief.'},)
    """
    if value is None:
        raise missing(place)
    if not isinstance(value, list) or not value:
        raise wrong(place, value, "give a list with at least one message")
    return tuple(_message(each, f"{place}[{index}]", by) for index, each in enumerate(value))


def _message(value: Any, place: str, by: str) -> ChatMessage:
    if not isinstance(value, dict):
        raise wrong(place, value, "give an object with 'role' and 'content'")
    where = f"{place}."
    if value.get("role") in ("tool", "function"):  # before its fields, of which tool_call_id is one
        fix = "give another one: such messages are not supported, as tools are not"
        raise wrong(f"{where}role", value["role"], fix)
    fields = check_fields(
        value, ("role", "content", "name"), where=where, harmless=(), neutral=_EMPTY_OF_MESSAGE, by=by
    )
    role, content = fields.get("role"), fields.get("content")
    if role is None:
        raise missing(f"{where}role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{where}role", role, f"give one of {', '.join(_ROLES)}")
    if content is None and role != "assistant":
        raise missing(f"{where}content")
    message = {"role": _ROLES[role], "content": _text(content, f"{where}content")}
    if (name := string_field(fields, "name", where)) is not None:
        message["name"] = name
    return message


def _text(value: Any, place: str) -> str:
    """Text of a message: a string, null, or parts of type text, which are joined by newlines as in vLLM."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise wrong(place, value, "give a string, or a list of parts of type text")
    texts = []
    for index, part in enumerate(value):
        where = f"{place}[{index}]"
        if not isinstance(part, dict):
            raise wrong(where, part, 'give {"type": "text", "text": ...}')
        if part.get("type") != "text":
            raise wrong(f"{where}.type", part.get("type"), "give parts of type 'text': others are not supported")
        if not isinstance(part.get("text"), str) or part.keys() > {"type", "text"}:
            raise wrong(where, part, "give the keys 'type' and 'text' alone, and a string in 'text'")
        texts.append(part["text"])
    return "\n".join(texts)

"""Names of request fields: honoured, harmless, or refused, alike in a body and in a line of a traffic file."""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping
from typing import Any

# They say something about the request and nothing about its answer.
HARMLESS = frozenset({
    *("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction", "request_id", "session_id"),
})  # fmt: skip

# They would change the answer, and are not supported: only these values, or null, say that they are not wanted.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "store": (False,),
    "reasoning_effort": (), "verbosity": ("medium",), "best_of": (1,), "echo": (False,), "suffix": ("",),
    # vLLM's and SGLang's
    "repetition_penalty": (1,), "length_penalty": (1,), "use_beam_search": (False,),
    "min_tokens": (0,), "stop_token_ids": ([],), "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,), "bad_words": ([],), "allowed_token_ids": (), "prompt_logprobs": (),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "chat_template": (),
    "chat_template_kwargs": ({},), "documents": ([],), "priority": (0,), "include_reasoning": (True,),
    "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "regex": (), "ebnf": (), "json_schema": (), "lora_path": (), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}  # fmt: skip


class FieldError(ValueError):
    """A field of a request that is neither honoured nor ignored.

    Args:
        message: What is wrong, the value, and the fix.
        param: Place of the field in the request.
        code: Code for programs, as in OpenAI's errors.

    Example:
        >>> FieldError("n is 0; give an integer >= 1", "n").code
        'invalid_value'
    """

    def __init__(self, message: str, param: str, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


def refusal(
    name: str, value: Any, neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL, *, where: str = "", by: str = "this server"
) -> str | None:
    """Return why a field is refused; None if it may be ignored, because it is unknown or its value says nothing.

    ``neutral`` has the fields that are not supported ``by`` whom, each with the values that say that it is not wanted;
    null always does. ``where`` is the place of the field in the request, with a dot after it.

    Example:
        >>> refusal("presence_penalty", 0.5)
        'presence_penalty is not supported by this server: leave it out, or set it to 0'
        >>> refusal("presence_penalty", 0.0), refusal("my_column", 0.5)
        (None, None)
    """
    if name not in neutral or value is None or any(_same(value, each) for each in neutral[name]):
        return None
    values = " or ".join(json.dumps(each) for each in neutral[name])
    return f"{where}{name} is not supported by {by}: leave it out" + (f", or set it to {values}" if values else "")


def _same(value: Any, neutral: Any) -> bool:
    """Return whether two values of JSON are the same: 0.0 and 0 are, but false and 0 are not, equal in Python."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def check_fields(
    fields: Mapping[str, Any],
    known: Collection[str],
    *,
    where: str = "",
    harmless: Collection[str] = HARMLESS,
    neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
    by: str = "this server",
) -> dict[str, Any]:
    """Return the known fields of an object, and refuse by name what is not supported.

    A null field says nothing, whatever its name: clients send one for each field that they know and do not use.
    ``harmless`` fields are dropped whatever they hold; for ``neutral``, ``where`` and ``by`` see :func:`refusal`.

    Raises:
        FieldError: A field is unknown or asks for something that is not supported.

    Example:
        >>> check_fields({"n": 2, "user": "me", "presence_penalty": 0.0}, ["n"])
        {'n': 2}
    """
    kept = {}
    for name, value in fields.items():
        place = f"{where}{name}"
        if name in known:
            kept[name] = value
        elif (reason := refusal(name, value, neutral, where=where, by=by)) is not None:
            raise FieldError(reason, place, "unsupported_field")
        elif value is not None and name not in harmless and name not in neutral:
            near = difflib.get_close_matches(name[:64], [*known, *neutral], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise FieldError(f"unknown field {place[:100]!r}{hint}", place[:100], "unknown_field")
    return kept

"""Fields of request bodies that change nothing here: those that may be ignored, and those that must be neutral."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any

from aurora_rl.serving.http.errors import ApiError

# They say something about the request and nothing about its answer.
HARMLESS = frozenset({
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction", "request_id", "session_id", "cache_salt"),
})  # fmt: skip

# They would change the answer, and are not supported: only these values, or null, say that they are not wanted.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "tools": ([],), "tool_choice": ("none",), "functions": ([],), "function_call": ("none",),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "web_search_options": (),
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},),
    "reasoning_effort": (), "verbosity": ("medium",), "best_of": (1,), "echo": (False,), "suffix": ("",),
    # vLLM's and SGLang's
    "min_p": (0,), "repetition_penalty": (1,), "length_penalty": (1,), "use_beam_search": (False,),
    "ignore_eos": (False,), "min_tokens": (0,), "stop_token_ids": ([],), "include_stop_str_in_output": (False,),
    "no_stop_trim": (False,), "bad_words": ([],), "allowed_token_ids": (), "prompt_logprobs": (),
    "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,), "truncate_prompt_tokens": (),
    "add_generation_prompt": (True,), "continue_final_message": (False,), "chat_template": (),
    "chat_template_kwargs": ({},), "documents": ([],), "priority": (0,), "include_reasoning": (True,),
    "structured_outputs": (), "guided_json": (), "guided_regex": (), "guided_choice": (), "guided_grammar": (),
    "regex": (), "ebnf": (), "json_schema": (), "lora_path": (), "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
}  # fmt: skip


def check_fields(
    body: Mapping[str, Any],
    known: Collection[str],
    *,
    where: str = "",
    harmless: Collection[str] = HARMLESS,
    neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL,
) -> dict[str, Any]:
    """Return the known fields of an object, and refuse by name what this server does not support.

    Args:
        body: The object.
        known: Names of the fields that are honoured.
        where: Place of the object in the request's body, with a dot after it.
        harmless: Names of fields that are dropped whatever they hold.
        neutral: Values of fields that are not supported which say that they are not wanted; null always does.

    Raises:
        ApiError: Status 400, where a field is unknown or asks for something that is not supported.

    Example:
        >>> check_fields({"n": 2, "user": "me", "presence_penalty": 0.0}, ["n"])
        {'n': 2}
    """
    kept = {}
    for name, value in body.items():
        place = f"{where}{name}"
        if name in known:
            kept[name] = value
        elif name in harmless or (name in neutral and (value is None or value in neutral[name])):
            continue
        elif name in neutral:
            leave = " or ".join(repr(each) for each in neutral[name])
            fix = "leave it out" + (f", or set it to {leave}" if leave else "")
            raise ApiError(
                400, f"{place} is not supported by this server: {fix}", param=place, code="unsupported_field"
            )
        else:
            near = difflib.get_close_matches(name[:64], [*known, *neutral], 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ApiError(400, f"unknown field {place[:100]!r}{hint}", param=place[:100], code="unknown_field")
    return kept

"""Fields of OpenAI's, vLLM's and SGLang's requests that are not honoured: those that may be ignored, and the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# They say something about the request and nothing about its answer.
HARMLESS = frozenset({
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("parallel_tool_calls", "prediction", "request_id", "session_id"),
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


def refusal(
    name: str, value: Any, neutral: Mapping[str, tuple[Any, ...]] = NEUTRAL, *, where: str = "", by: str = "this server"
) -> str | None:
    """Return why a field is refused; None if it may be ignored, because it is unknown or its value says nothing.

    Args:
        name: Name of the field.
        value: Its value.
        neutral: Fields that are not supported, each with the values that say that it is not wanted; null always does.
        where: Place of the field in the request, with a dot after it.
        by: Who does not support the field.

    Example:
        >>> refusal("presence_penalty", 0.5)
        'presence_penalty is not supported by this server: leave it out, or set it to 0'
        >>> refusal("presence_penalty", 0.0), refusal("my_column", 0.5)
        (None, None)
    """
    if name not in neutral or value is None or value in neutral[name]:
        return None
    values = " or ".join(repr(each) for each in neutral[name])
    return f"{where}{name} is not supported by {by}: leave it out" + (f", or set it to {values}" if values else "")


def check_cache_salt(value: object) -> str | None:
    """Return a cache salt, or null, that passes vLLM's check.

    Raises:
        ValueError: It does not.

    Example:
        >>> check_cache_salt("tenant-7")
        'tenant-7'
    """
    if value is None or (isinstance(value, str) and 1 <= len(value) <= 128 and not set(value) & set("@/\\\0")):
        return value
    raise ValueError(r"give a string of 1 to 128 characters, none of them @, /, \ or NUL")

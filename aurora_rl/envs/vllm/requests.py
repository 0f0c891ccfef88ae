"""vLLM's requests: which are learned from, how they were sampled, and what their ends mean."""

from __future__ import annotations

import re
from typing import Any

from aurora_rl.envs.remote.assembler import captured
from aurora_rl.sampling_params import SamplingParams, seed_after

# What vLLM puts around a client's id: the number of a choice, what OpenAI's API begins with, the number of a
# completion's prompt, which a chat has none of, and eight characters.
_DECORATION = re.compile(r"^(?:\d+_)?(?:cmpl-(.+)-\d+|chatcmpl-(.+))-[0-9a-f]{8}$")
_TERMINATED = ("FINISHED_STOPPED", "FINISHED_REPETITION")
_COMPLETE = (*_TERMINATED, "FINISHED_LENGTH_CAPPED")


def client_id(rid: str) -> str:
    """Return the id that a client gave its request, from vLLM's own. All choices of a request have one.

    >>> client_id("cmpl-17-0-90a1b2c3"), client_id("1_chatcmpl-user-42-90a1b2c3"), client_id("17")
    ('17', 'user-42', '17')
    """
    found = _DECORATION.match(rid)
    return (found[1] or found[2]) if found else rid


def unwanted(new: Any, *, capture_rate: float) -> str | None:
    """Return why a request that begins is not learned from, None if it is; ``new`` is vLLM's ``NewRequestData``."""
    params = new.sampling_params
    if params is None:
        return "pooling"
    # vllm_xargs know no booleans, and what is not plainly a yes is a no.
    if str((params.extra_args or {}).get("aurora_rl", True)).lower() not in ("true", "1"):
        return "opt_out"
    if new.lora_request is not None:
        return "adapter"
    if new.mm_features or new.prompt_embeds is not None or new.prompt_token_ids is None:
        return "multimodal"
    changes = [params.presence_penalty, params.frequency_penalty, params.logit_bias, params.allowed_token_ids]
    changes += [params.bad_words, params.min_tokens, params.thinking_token_budget]
    if any(changes) or params.repetition_penalty != 1.0:
        return "penalty"
    if params.structured_outputs is not None:
        return "grammar"
    if params.min_p:
        return "min_p"
    return None if captured(client_id(new.req_id), capture_rate) else "not_captured"


def sampling_of(params: Any) -> SamplingParams:
    """Return how a request was sampled, from vLLM's sampling parameters."""
    greedy = params.temperature == 0
    return SamplingParams(
        temperature=params.temperature,
        top_k=0 if greedy else max(params.top_k, 0),
        top_p=1.0 if greedy else params.top_p,
        seed=seed_after(params.seed or 0, 0),
    )


def how_it_ended(status: str, *, stops: bool) -> str:
    """Return "terminated", "budget" or "aborted" for vLLM's status of a finished request.

    Stop strings are found where text is made, and the engine hears of an abort. So a request that ``stops`` at some
    and was aborted has terminated itself, or its client left: its tokens are the target's either way.
    """
    if status in _COMPLETE:
        return "terminated" if status in _TERMINATED else "budget"
    return "terminated" if stops and status == "FINISHED_ABORTED" else "aborted"

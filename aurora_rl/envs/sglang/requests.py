"""SGLang's request objects: which are learned from, and how they were sampled."""

from __future__ import annotations

from typing import Any

from aurora_rl.envs.remote.assembler import captured
from aurora_rl.sampling_params import SamplingParams, seed_after

_ALL_TOKENS = 1 << 30  # SGLang's top-k where there is none


def unwanted(req: Any, *, capture_rate: float, greedy_only: bool) -> str | None:
    """Return why a request is not learned from, None if it is; ``greedy_only`` engines answer with the argmax."""
    params = req.sampling_params
    if req.rid.startswith("HEALTH_CHECK"):
        return "health_check"
    if isinstance(params.custom_params, dict) and params.custom_params.get("aurora_rl") is False:
        return "opt_out"
    if len(req.output_ids):
        return "retracted"
    penalties = (params.logit_bias, params.frequency_penalty, params.presence_penalty, params.min_new_tokens)
    if any(penalties) or params.repetition_penalty != 1.0:
        return "penalty"
    if req.grammar is not None or params.json_schema or params.regex or params.ebnf or params.structural_tag:
        return "grammar"
    if params.top_k != 1 and greedy_only:
        return "temperature"
    if getattr(params, "min_p", 0.0):
        return "min_p"
    return None if captured(req.rid, capture_rate) else "not_captured"


def sampling_of(req: Any) -> SamplingParams:
    """Return how a request was sampled."""
    params = req.sampling_params
    greedy = params.top_k == 1
    return SamplingParams(
        temperature=0.0 if greedy else params.temperature,
        top_k=0 if greedy or params.top_k >= _ALL_TOKENS else params.top_k,
        top_p=1.0 if greedy else params.top_p,
        seed=seed_after(params.sampling_seed or 0, 0),
    )

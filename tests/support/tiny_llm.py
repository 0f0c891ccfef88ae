"""An LLM of the tiny model in float64, and what several files of tests ask it."""

from __future__ import annotations

from pathlib import Path

from aurora_rl import LLM, Completion, SamplingParams

CHAT = [{"role": "user", "content": "Hello"}]
PROMPTS = ["Once upon", CHAT, [5, 6, 7], [*CHAT, {"role": "assistant", "content": "Hi"}, *CHAT], "x"]
SHORT = SamplingParams(max_tokens=24)


def llm(folder: Path, drafter: object = "eagle3", **settings: object) -> LLM:
    return LLM(folder, drafter=drafter, dtype="float64", device="cpu", **{"num_slots": 2, **settings})


def texts(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens.tolist() for completion in completions]

"""LLM: it learns from what it served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_llm import PROMPTS, SHORT, llm, texts

from aurora_rl import LLM, Completion, SamplingParams


@pytest.fixture(scope="module")
def drafted(tiny_folder: Path) -> LLM:
    return llm(tiny_folder, record=True)


@pytest.fixture(scope="module")
def plain(tiny_folder: Path) -> LLM:
    return llm(tiny_folder, None)


def test_it_learns_from_what_it_served(tiny_folder: Path) -> None:
    served = llm(tiny_folder, record=True)
    before = served.generate(PROMPTS, SHORT)
    for _ in range(6):
        served.learn(before, [{"name": "imitation", "steps": 3}], replay=8)
    after = served.generate(PROMPTS, SHORT)
    assert texts(after) == texts(before)

    def acceptance(completions: list[Completion]) -> float:
        return sum(completion.acceptance_length for completion in completions) / len(completions)

    assert acceptance(after) > acceptance(before) + 0.5
    assert after[0].trajectory["rounds", "policy_version"].unique().tolist() == [6]


def test_a_single_completion_is_learned_from(drafted: LLM) -> None:
    (completion,) = drafted.generate("abc", SHORT)
    assert drafted.learn(completion, replay=0) > 0


@pytest.mark.parametrize(
    ("completions", "settings", "message"),
    [
        (["a", "b"], {}, r"completions has a str; give what llm.generate\(...\) returned"),
        ("text", {}, "completions has a str; give what"),
        (None, {}, "completions has a NoneType; give what"),
        ([], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([], {"batch_size": 1.5}, "batch_size must be an integer, got 1.5"),
        ([], {"replay": -1}, "replay must be at least 0, got -1"),
        ("SERVED", {"objectives": "imitation"}, "objectives is 'imitation'; give a list of mappings"),
        ("SERVED", {"objectives": ["imitation"]}, "an objective needs a name, got 'imitation'"),
        (
            "SERVED",
            {"objectives": {"name": "imitation"}},
            "objectives is {'name': 'imitation'}; give a list of mappings",
        ),
        ("SERVED", {"objectives": []}, "objectives is empty; name at least one"),
        ("SERVED", {"objectives": [{"name": "imitation", "weight": -1}]}, "weight must be finite and not negative"),
        ("SERVED", {"objectives": [{"nam": "imitation"}]}, "name"),
        ("SERVED", {"objectives": [{"name": "imitatio"}]}, "imitation"),
    ],
)
def test_what_cannot_be_learned_is_named(
    drafted: LLM, completions: Any, settings: dict[str, Any], message: str
) -> None:
    completions = drafted.generate("abc", SHORT) if completions == "SERVED" else completions
    with pytest.raises(ValueError, match=message):
        drafted.learn(completions, **settings)


def test_there_must_be_something_to_learn_from(plain: LLM, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="there is no drafter to train; name one, such as"):
        plain.learn([])
    silent = llm(tiny_folder)
    with pytest.raises(ValueError, match="no completion has a trajectory to learn from; make the LLM with record=True"):
        silent.learn(silent.generate("abc", SHORT))
    recording = llm(tiny_folder, record=True)
    with pytest.raises(ValueError, match="no completion is long enough to learn from: the third token of a text, "):
        recording.learn(recording.generate([[3], [4]], SamplingParams(max_tokens=1)))
    assert recording.learn(recording.generate([[3], [4]], SamplingParams(max_tokens=2))) > 0

"""LLM: trees by measured acceptance and cost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from aurora_rl import LLM, Completion, SamplingParams, TreeShape
from aurora_rl.policies import Eagle3Drafter, decoder

PROMPTS = ["a", "Hello", "abc", "abcabcabc"]
LONG = SamplingParams(max_tokens=64, ignore_eos=True)


def llm(folder: Path, **settings: Any) -> LLM:
    return LLM(folder, **{"drafter": "eagle3", "dtype": "float64", "device": "cpu", "num_slots": 2, **settings})


def price_of_drafts(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Have rounds of the drafter take so many seconds more than others, which take one."""

    def measured(engine: Any, policy: Any, request: Any, shapes: list[TreeShape], **settings: Any) -> Any:
        cost = {each: 1.0 + seconds * (each.depth > 0 and not each.lookup_only) for each in shapes}
        return dict.fromkeys((1, 2), cost)

    monkeypatch.setattr(decoder, "measure_rounds", measured)


def drafted(completions: list[Completion]) -> int:
    return sum(completion.drafts.num_rounds for completion in completions)


@pytest.mark.parametrize("shape", [None, TreeShape(3, 2), TreeShape(2, 2, mode="sampled")], ids=str)
def test_the_text_is_the_same(tiny_folder: Path, shape: TreeShape | None) -> None:
    plain, adaptive = llm(tiny_folder, drafter=None), llm(tiny_folder, shape=shape, adaptive=True, max_length=96)
    for params in (LONG, SamplingParams(temperature=1.0, seed=3, max_tokens=40)):
        expected, found = plain.generate(PROMPTS, params), adaptive.generate(PROMPTS, params)
        assert [each.tokens.tolist() for each in found] == [each.tokens.tolist() for each in expected]


def test_a_drafter_that_does_not_pay_rests(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = llm(tiny_folder, shape=TreeShape(3)).generate(PROMPTS * 2, LONG)
    price_of_drafts(monkeypatch, 100.0)
    adaptive = llm(tiny_folder, shape=TreeShape(3), adaptive=True).generate(PROMPTS * 2, LONG)
    assert 0 < drafted(adaptive) < 0.5 * drafted(fixed)


def test_new_weights_are_tried_again(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    price_of_drafts(monkeypatch, 0.0)
    served = llm(tiny_folder, adaptive=True, record=True)
    controller, told = served._decoder.controller, []
    monkeypatch.setattr(controller, "swapped", lambda: told.append(True))
    served.learn(served.generate(PROMPTS, LONG))
    assert told == [True]


def test_a_drafter_that_fails_ends_nothing(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def propose(*args: Any, **settings: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(Eagle3Drafter, "propose", propose)
    with caplog.at_level(logging.WARNING):
        served = llm(tiny_folder, adaptive=True)
    assert "the shape of the trees stays, since the drafter failed" in caplog.text and "a bug" in caplog.text
    assert served.generate(PROMPTS, LONG)[0].text == llm(tiny_folder, drafter=None).generate(PROMPTS, LONG)[0].text


def test_without_a_drafter_there_is_nothing_to_choose(tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match="adaptive is True, and there is no drafter to draft; name one, such as"):
        llm(tiny_folder, drafter=None, adaptive=True)

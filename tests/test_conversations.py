"""Prompts become requests in order, answers become the next turns."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from aurora_rl.conversations import Conversations
from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.traffic import Prompt, TrafficError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, so that prompts can be read and counted in the tests."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({"<eos>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


TOKENIZER = byte_tokenizer()


def prompt(id: str, text: str, *follow_ups: str, domain: str = "chat") -> Prompt:
    return Prompt(id, domain, ({"role": "user", "content": text},), follow_ups)


def conversations(*prompts: Prompt, **options: object) -> Conversations:
    defaults = {"max_new_tokens": 10, "max_length": 60, "sampling": SamplingParams(0.5, 7, 0.9, seed=100)}
    return Conversations(prompts, TOKENIZER, **(defaults | options))


def read(request: Request | None) -> str:
    assert request is not None
    return TOKENIZER.decode(request.prompt)


def answer(request: Request, text: str) -> Completion:
    return Completion(request, torch.tensor([*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]), True, None)


def test_first_turns_in_order() -> None:
    source = conversations(prompt("p", "one", domain="code"), prompt("q", "two"), prompt("r", "three"))
    assert source.total == 3
    assert [TOKENIZER.decode(tokens) for tokens in source.first_prompts(2)] == ["<u>one<a>", "<u>two<a>"]
    requests = [source(), source(), source()]
    assert [read(r) for r in requests] == ["<u>one<a>", "<u>two<a>", "<u>three<a>"]
    assert [r.id for r in requests] == [0, 1, 2] and all(r.max_new_tokens == 10 for r in requests)
    # A seed of its own for each, so that two requests with one prompt do not share their noise.
    assert [r.sampling for r in requests] == [SamplingParams(0.5, 7, 0.9, seed=100 + i) for i in range(3)]
    assert source() is None
    assert source.completed(answer(requests[1], "x")) == "chat" and source.completed(answer(requests[0], "x")) == "code"
    assert source() is None and source.failed == []


def test_follow_ups_come_after_the_answers_they_follow() -> None:
    source = conversations(prompt("p", "one", "more", "enough"), prompt("q", "two"))
    assert source.total == 4
    first, second = source(), source()
    assert source() is None  # the second turn cannot be asked yet
    source.completed(answer(first, "yes"))
    third = source()
    assert read(third) == "<u>one<a>yes<u>more<a>" and third.id == 2 and third.sampling.seed == 102
    source.completed(answer(second, "no"))
    assert source() is None  # q has no further turn
    source.completed(answer(third, "ok"))
    fourth = source()
    assert read(fourth) == "<u>one<a>yes<u>more<a>ok<u>enough<a>"
    source.completed(answer(fourth, "bye"))
    assert source() is None and source.failed == []


def test_a_first_turn_that_does_not_fit_is_refused_before_anything_is_served() -> None:
    fits, too_long = prompt("fits", "x" * 44), prompt("long", "x" * 45)  # 6 more for the template, 10 for the answer
    assert conversations(fits)() is not None
    with pytest.raises(TrafficError, match="prompt 'long' has 51 tokens; with max_new_tokens=10 that exceeds "
                                           "engine.max_length=60; shorten it"):  # fmt: skip
        conversations(fits, too_long)


def test_a_follow_up_that_does_not_fit_fails_with_those_after_it() -> None:
    source = conversations(prompt("p", "x" * 30, "more", "enough"), prompt("q", "two", "again"))
    first, second = source(), source()
    assert source.completed(answer(first, "y" * 8)) == "chat"  # 30 + 8 + 4 + 12 of the template: 54, and 10 to come
    assert source() is None
    assert source.failed == ["prompt 'p', turn 2: 54 tokens do not fit"] * 2
    source.completed(answer(second, "y"))
    last = source()
    assert read(last) == "<u>two<a>y<u>again<a>"  # other conversations go on
    source.completed(answer(last, "z"))
    assert source() is None and len(source.failed) == 2
    assert source.total == 3 + len(source.failed)  # each was served or failed


def test_traffic_is_not_changed() -> None:
    traffic = prompt("p", "one", "more")
    source = conversations(traffic)
    source.completed(answer(source(), "yes"))
    assert read(source()) == "<u>one<a>yes<u>more<a>"
    assert traffic == prompt("p", "one", "more")

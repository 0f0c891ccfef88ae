"""Prompts become requests in order, answers become the next turns."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.serving.requests import RequestQueue, turn_seed
from aurora_rl.telemetry.log import JsonLines
from aurora_rl.workload.traffic import Prompt, TrafficError

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


def queue_of(*prompts: Prompt, **options: object) -> RequestQueue:
    sampling = SamplingParams(0.5, 7, 0.9, seed=100, max_tokens=10)
    defaults = {"vocab_size": len(TOKENIZER), "max_length": 60, "sampling_params": sampling}
    return RequestQueue(prompts, TOKENIZER, **(defaults | options))


def read(request: Request | None) -> str:
    assert request is not None
    return TOKENIZER.decode(request.prompt)


def answer(request: Request, text: str) -> Completion:
    return Completion(request, torch.tensor([*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]), True, None)


def test_first_turns_in_order() -> None:
    source = queue_of(prompt("p", "one", domain="code"), prompt("q", "two"), prompt("r", "three"))
    assert source.total == 3
    assert [TOKENIZER.decode(tokens) for tokens in source.first_prompts(2)] == ["<u>one<a>", "<u>two<a>"]
    requests = [source(), source(), source()]
    assert [read(r) for r in requests] == ["<u>one<a>", "<u>two<a>", "<u>three<a>"]
    assert [r.id for r in requests] == [0, 1, 2]
    # A seed of its own for each, so that two requests with one prompt do not share their noise.
    assert [r.sampling_params for r in requests] == [
        SamplingParams(0.5, 7, 0.9, 100 + i, max_tokens=10) for i in range(3)
    ]
    assert source() is None
    assert source.completed(answer(requests[1], "x")) == "chat" and source.completed(answer(requests[0], "x")) == "code"
    assert source() is None and source.failed == []


def test_follow_ups_come_after_the_answers_they_follow() -> None:
    source = queue_of(prompt("p", "one", "more", "enough"), prompt("q", "two"))
    assert source.total == 4 and not source.done
    first, second = source(), source()
    assert source() is None  # the second turn cannot be asked yet
    source.completed(answer(first, "yes"))
    third = source()
    assert read(third) == "<u>one<a>yes<u>more<a>" and third.id == 2
    source.completed(answer(second, "no"))
    assert source() is None and not source.done  # q has no further turn, and p waits for an answer
    source.completed(answer(third, "ok"))
    fourth = source()
    assert read(fourth) == "<u>one<a>yes<u>more<a>ok<u>enough<a>"
    source.completed(answer(fourth, "bye"))
    assert source() is None and source.failed == [] and source.done and source.answered == 4


def fails_alone(fourth: Prompt, reason: str, **options: object) -> None:
    """Of five prompts the fourth, with its follow-up, fails for the reason; the others keep their ids and seeds."""
    good = [prompt(name, name) for name in "abcd"]
    source = queue_of(*good[:3], fourth, good[3], **options)
    requests = [source() for _ in range(4)]
    assert [read(r) for r in requests] == ["<u>a<a>", "<u>b<a>", "<u>c<a>", "<u>d<a>"] and source() is None
    assert [(r.id, r.sampling_params.seed) for r in requests] == [(0, 100), (1, 101), (2, 102), (4, 104)]
    assert len(source.failed) == 2 and source.total == 4 + len(source.failed)
    assert all(re.fullmatch(f"prompt 'bad', turn 1: {reason}", failed) for failed in source.failed)


def test_a_prompt_that_does_not_fit_fails_alone() -> None:
    fits, too_long = prompt("fits", "x" * 44), prompt("bad", "x" * 45, "more")  # 6 for the template, 10 for the answer
    assert queue_of(fits)() is not None
    reason = "the prompt has 51 tokens; with max_new_tokens=10 that exceeds engine.max_length=60; shorten it.*"
    fails_alone(too_long, reason)
    with pytest.raises(TrafficError, match=f"none of the prompts can be served .2.; the first: prompt 'bad'.*{reason}"):
        queue_of(too_long, too_long)


def test_a_prompt_with_tokens_that_the_model_lacks_fails_alone() -> None:
    text = prompt("bad", "\xff", "more")  # its second byte has a higher id than any of the others'
    assert max(TOKENIZER("\xff")["input_ids"]) == 128
    fails_alone(text, "the tokenizer gives token 128, and the model knows 0..127; take the model's .*", vocab_size=128)


@pytest.mark.parametrize(
    ("raises", "reason"),
    [("raise_exception('no such role')", "no such role"), ("m.content + 1", r"TypeError: can only concatenate .*")],
)
def test_a_prompt_that_the_chat_template_refuses_fails_alone(
    monkeypatch: pytest.MonkeyPatch, raises: str, reason: str
) -> None:
    template = (
        "{% for m in messages %}{% if 'bad' in m.content %}{{ " + raises + " }}{% endif %}{% endfor %}" + TEMPLATE
    )
    monkeypatch.setattr(TOKENIZER, "chat_template", template)
    monkeypatch.setattr(TOKENIZER, "name_or_path", "a/model")
    fails_alone(
        prompt("bad", "bad", "more"), f"the chat template of model 'a/model' refuses the conversation: {reason}"
    )
    with pytest.raises(TrafficError, match="template of model 'a/model' refuses the conversation"):
        queue_of(prompt("p", "bad"))
    source = queue_of(prompt("p", "one", "bad"), prompt("q", "two"))
    source.completed(answer(source(), "yes"))
    assert len(source.failed) == 1 and source.failed[0].startswith("prompt 'p', turn 2: the chat template of")
    assert read(source()) == "<u>two<a>"


def test_a_prompt_without_tokens_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TOKENIZER, "chat_template", "{% if messages[0].content != 'bad' %}" + TEMPLATE + "{% endif %}")
    fails_alone(prompt("bad", "bad", "more"), "the prompt has no tokens.*")


def test_what_the_engine_refuses_fails_with_its_later_turns() -> None:
    source = queue_of(prompt("p", "one", "more"), prompt("q", "two"))
    source.refused(source(), "request 0: no room")
    assert source.failed == ["prompt 'p', turn 1: request 0: no room"] * 2
    last = source()
    assert read(last) == "<u>two<a>" and source() is None and not source.done
    source.refused(last, "request 1: no room")
    assert source.done and source.answered == 0


def test_the_seed_after_the_largest_is_the_least() -> None:
    sampling = SamplingParams(seed=2**63 - 1, max_tokens=10)
    source = queue_of(prompt("p", "one", "more"), prompt("q", "two"), sampling_params=sampling)
    first, second = source(), source()
    assert (first.sampling_params.seed, second.sampling_params.seed) == (2**63 - 1, -(2**63))
    source.completed(answer(first, "yes"))
    assert 0 <= source().sampling_params.seed < 2**63


def test_without_a_seed_every_turn_draws_its_own() -> None:
    sampling = SamplingParams(temperature=1.0, max_tokens=10)
    source = queue_of(prompt("p", "one", "more"), prompt("q", "two"), sampling_params=sampling)
    first, second = source(), source()
    source.completed(answer(first, "yes"))
    assert len({each.sampling_params.seed for each in (first, second, source())} - {None}) == 3


def test_seeds_of_follow_ups_depend_on_no_other_request() -> None:
    def texts(order: list[int]) -> dict[str, int]:
        """Seeds by text, where requests in flight are answered in this order."""
        source = queue_of(prompt("p", "one", "more", "enough"), prompt("q", "two", "again"), max_length=99)
        flying, seeds = [source(), source()], {}
        for place in order:
            request = flying.pop(place)
            seeds[read(request)] = request.sampling_params.seed
            source.completed(answer(request, "yes"))
            flying += [following] if (following := source()) else []
        return seeds

    seeds = texts([0, 0, 0, 0, 0])
    assert seeds == texts([1, 1, 0, 0, 0]) == texts([0, 1, 1, 0, 0])
    assert len(set(seeds.values())) == 5 and seeds["<u>one<a>"] == 100 and seeds["<u>two<a>"] == 101
    # A documented function: whoever has the seed can serve a turn again.
    assert seeds["<u>two<a>yes<u>again<a>"] == turn_seed(101, 1) == 2311744442912917512


def test_what_a_line_asks_for_counts_before_the_configuration() -> None:
    asked = Prompt(
        "p",
        "",
        ({"role": "user", "content": "one"},),
        ("more",),
        50,
        {"temperature": 0, "seed": 7, "ignore_eos": True},
        ("\n", "END"),
    )
    short = Prompt("q", "", ({"role": "user", "content": "x" * 45},), max_tokens=9)
    source = queue_of(asked, short, prompt("r", "three"))
    requests = [source(), source(), source()]
    assert [r.sampling_params for r in requests] == [
        SamplingParams(0, 7, 0.9, seed=7, max_tokens=50, stop=("\n", "END"), ignore_eos=True),
        SamplingParams(0.5, 7, 0.9, seed=101, max_tokens=9),
        SamplingParams(0.5, 7, 0.9, seed=102, max_tokens=10),
    ]
    source.completed(answer(requests[0], "yes"))
    assert source.failed == [
        "prompt 'p', turn 2: the prompt has 22 tokens; with max_tokens=50 that exceeds engine.max_length=60; "
        "shorten it, or raise engine.max_length up to the model's context"
    ]


def test_a_stop_string_ends_the_answer_and_is_no_part_of_it() -> None:
    source = queue_of(Prompt("p", "", ({"role": "user", "content": "one"},), ("more",), stop=("END",)))
    source.completed(answer(source(), "yes END"))
    assert read(source()) == "<u>one<a>yes <u>more<a>"


def test_every_turn_is_served_as_its_line_says() -> None:
    first = replace(prompt("p", "one", "more"), speculative=False, cache_salt="a")
    second = replace(prompt("q", "two"), learn=False)
    source = queue_of(first, second, prompt("r", "three"))
    requests = [source(), source(), source()]
    source.completed(answer(requests[0], "yes"))
    assert [(r.speculative, r.learn, r.cache_salt) for r in [*requests, source()]] == [
        (False, True, "a"), (True, False, None), (True, True, None), (False, True, "a"),
    ]  # fmt: skip


def test_a_follow_up_that_does_not_fit_fails_with_those_after_it() -> None:
    source = queue_of(prompt("p", "x" * 30, "more", "enough"), prompt("q", "two", "again"))
    first, second = source(), source()
    assert source.completed(answer(first, "y" * 8)) == "chat"  # 30 + 8 + 4 + 12 of the template: 54, and 10 to come
    assert source() is None
    assert len(source.failed) == 2 and set(source.failed) == {
        "prompt 'p', turn 2: the prompt has 54 tokens; with max_new_tokens=10 that exceeds engine.max_length=60; "
        "shorten it, or raise engine.max_length up to the model's context"
    }
    source.completed(answer(second, "y"))
    last = source()
    assert read(last) == "<u>two<a>y<u>again<a>"  # other conversations go on
    source.completed(answer(last, "z"))
    assert source() is None and len(source.failed) == 2
    assert source.total == 3 + len(source.failed)  # each was served or failed


def test_failed_turns_are_among_the_answers_as_soon_as_they_fail(tmp_path: Path) -> None:
    """So a run that is killed has them, too."""
    source = queue_of(prompt("p", "one", "more", "end"), prompt("long", "x" * 60), prompt("q", "two", "again"))
    source.write_answers(JsonLines(tmp_path / "answers.jsonl"))

    def lines() -> list[dict[str, object]]:
        return [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]

    assert [line["prompt"] for line in lines()] == ["long"]  # it failed when the traffic was read
    source.completed(answer(source(), "yes"))
    source.refused(source(), "no room")
    assert len(lines()) == 4
    source.completed(answer(source(), "y" * 60))  # which leaves no room for the last turn
    assert [(line["prompt"], line["turn"], "text" in line) for line in lines()] == [
        ("long", 1, False), ("p", 1, True), ("q", 1, False), ("q", 2, False), ("p", 2, True), ("p", 3, False),
    ]  # fmt: skip
    errors = [str(line["error"]) for line in lines() if "error" in line]
    assert "the prompt has 66 tokens" in errors[0] and errors[1:3] == ["no room"] * 2
    assert "that exceeds engine.max_length=60" in errors[3]


def test_traffic_is_not_changed() -> None:
    traffic = prompt("p", "one", "more")
    source = queue_of(traffic)
    source.completed(answer(source(), "yes"))
    assert read(source()) == "<u>one<a>yes<u>more<a>"
    assert traffic == prompt("p", "one", "more")


def test_an_answer_that_ends_at_eos_shows_none(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    requests = RequestQueue(
        [Prompt("p", "chat", ({"role": "user", "content": "Hi"},))],
        tokenizer,
        vocab_size=len(tokenizer),
        max_length=256,
        sampling_params=SamplingParams(max_tokens=10),
    )
    request = requests()
    assert request is not None
    tokens = [*tokenizer("Yes.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert tokenizer.decode(tokens) != "Yes."
    requests.write_answers(JsonLines(tmp_path / "answers.jsonl"))
    assert requests.completed(Completion(request, torch.tensor(tokens), True, None)) == "chat"
    (line,) = (tmp_path / "answers.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "request": 0,
        "prompt": "p",
        "domain": "chat",
        "turn": 1,
        "text": "Yes.",
        "finish_reason": "stop",
        "tokens": len(tokens),
    }

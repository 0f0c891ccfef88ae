"""Answers over HTTP are those of plain decoding, whole or in pieces, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import math
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from aurora_rl.models.detokenizer import detokenize, token_bytes
from aurora_rl.models.loading import encode_chat
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.serving.http import front
from aurora_rl.serving.http.bodies import encoded

CHAT: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, caffé?"}]


def stream_of(pieces: Any) -> tuple[str, list[Any]]:
    """The text of a stream, and its pieces."""
    kept = list(pieces)
    text = "".join((c.delta.content or "") if hasattr(c, "delta") else c.text for piece in kept for c in piece.choices)
    return text, kept


def test_a_chat_gets_plain_decodings_text_whole_and_in_pieces(rig: Any, client: openai.OpenAI) -> None:
    prompt = encode_chat(rig.tokenizer, CHAT)
    tokens = rig.plain(prompt, 24)
    text = detokenize(rig.tokenizer, tokens)
    whole = client.chat.completions.create(model="tiny/model", messages=CHAT, max_tokens=24)
    choice = whole.choices[0]
    assert (choice.message.role, choice.message.content, choice.index) == ("assistant", text, 0)
    assert choice.finish_reason == ("length" if len(tokens) == 24 else "stop") and choice.logprobs is None
    assert whole.object == "chat.completion" and whole.id.startswith("chatcmpl-") and whole.model == "tiny/model"
    usage = whole.usage
    assert usage is not None and usage.prompt_tokens == len(prompt) and usage.completion_tokens == len(tokens)
    assert usage.total_tokens == len(prompt) + len(tokens)

    said, pieces = stream_of(
        client.chat.completions.create(model="tiny/model", messages=CHAT, max_completion_tokens=24, stream=True)
    )
    assert said == text and len(pieces) > 4
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[0].object == "chat.completion.chunk"
    assert all(piece.choices[0].delta.role is None for piece in pieces[1:])
    assert len({(piece.id, piece.created, piece.model) for piece in pieces}) == 1
    assert [piece.choices[0].finish_reason for piece in pieces if piece.choices[0].finish_reason] == [
        choice.finish_reason
    ]
    assert all(piece.usage is None for piece in pieces)


def test_a_stream_ends_with_its_usage_where_it_is_asked_for(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny/model", messages=CHAT, max_tokens=12)
    _, pieces = stream_of(
        client.chat.completions.create(
            model="tiny/model", messages=CHAT, max_tokens=12, stream=True, stream_options={"include_usage": True}
        )
    )
    assert pieces[-1].usage == whole.usage and pieces[-1].choices == []
    assert all(piece.usage is None and piece.choices for piece in pieces[:-1])
    assert pieces[-1].metrics["speculative_decoding"]["num_draft_tokens"] > 0


def test_the_usage_says_how_much_of_the_prompt_was_kept_from_earlier_requests(rig: Any, client: openai.OpenAI) -> None:
    def ask(messages: Any, n: int) -> tuple[Any, int]:
        answer = client.chat.completions.create(model="tiny/model", messages=messages, max_tokens=8, n=n)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        return answer.choices[0].message, answer.usage.prompt_tokens_details.cached_tokens or 0

    engine = rig.env.engine
    engine.prefix_cache = PrefixCache(1024)
    try:
        said, cached = ask(CHAT, n=2)
        assert cached == 0
        prompt = encode_chat(rig.tokenizer, CHAT)
        history = [*CHAT, {"role": "assistant", "content": said.content}, {"role": "user", "content": "And?"}]
        kept = [*prompt, *rig.plain(prompt, 8)][:-1]  # the last token has been through no pass
        again = len(os.path.commonprefix([kept, encode_chat(rig.tokenizer, history)]))
        # Three choices in two slots: the third finds the whole prompt, which the first two had to read.
        assert len(prompt) <= again == ask(history, n=3)[1]
    finally:
        engine.prefix_cache = None


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_prompt_is_found_by_requests_of_its_salt_and_tenant_alone(rig: Any, path: str) -> None:
    body = {"messages": CHAT} if "chat" in path else {"prompt": "Once upon a time"}

    def cached(salt: str | None, tenant: str | None = None) -> int:
        headers = {} if tenant is None else {"X-Aurora-Tenant": tenant}
        asked = body | {"max_tokens": 4, "cache_salt": salt}
        answer = httpx.post(rig.url + path, json=asked, headers=headers, timeout=30)
        return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

    rig.env.engine.prefix_cache = PrefixCache(1024)
    try:
        askers = [("a",), ("b",), (None,), ("a", "x"), (None, "x")]
        first, again = ([cached(*asker) for asker in askers] for _ in range(2))
    finally:
        rig.env.engine.prefix_cache = None
    assert first == [0] * 5 and len(set(again)) == 1 and again[0] > 10


def test_a_stream_is_server_sent_events(rig: Any) -> None:
    body = {"messages": CHAT, "max_tokens": 8, "stream": True, "stream_options": {"include_usage": True}}
    answer = httpx.post(f"{rig.url}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    lines = answer.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: {") for line in lines[:-2])
    pieces = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert all("usage" in piece for piece in pieces)
    assert [piece for piece in pieces if "metrics" in piece] == pieces[-1:]


def test_a_stream_without_usage_brings_the_metrics_in_its_last_piece(client: openai.OpenAI) -> None:
    _, pieces = stream_of(client.completions.create(model="tiny/model", prompt="ab", max_tokens=8, n=2, stream=True))
    assert [hasattr(piece, "metrics") for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].choices[0].finish_reason is not None


@pytest.mark.parametrize("speculative", [True, False])
def test_the_answer_says_what_became_of_its_drafts(client: openai.OpenAI, speculative: bool) -> None:
    extra = {"speculative": speculative}
    answer: Any = client.completions.create(
        model="tiny/model", prompt="abcabcabc", max_tokens=60, n=2, temperature=0, extra_body=extra
    )
    assert answer.choices[0].text == answer.choices[1].text
    metrics = answer.metrics["speculative_decoding"]
    histogram, steps = metrics["acceptance_histogram"], metrics["num_spec_steps"]
    accepted = sum(count * rounds for count, rounds in enumerate(histogram))
    assert answer.metrics["drafter_version"] == 0
    assert len(histogram) == metrics["num_spec_tokens"] + 1 and metrics["num_spec_tokens"] >= 5
    assert sum(histogram) == steps and metrics["num_accepted_draft_tokens"] == accepted
    if speculative:
        assert steps > 0 and metrics["mean_acceptance_length"] == pytest.approx(1 + accepted / steps)
        assert metrics["draft_acceptance_rate"] == pytest.approx(accepted / metrics["num_draft_tokens"])
    else:
        assert (steps, metrics["num_draft_tokens"], metrics["mean_acceptance_length"]) == (0, 0, 1.0)


@pytest.mark.parametrize(
    "prompt", ["Once", ["Once", "twice"], [79, 80], [[79, 80], [81]]], ids=["text", "texts", "ids", "lists of ids"]
)
def test_every_kind_of_prompt_is_continued(rig: Any, client: openai.OpenAI, prompt: Any) -> None:
    several = isinstance(prompt, list) and not isinstance(prompt[0], int)
    listed = [each if isinstance(each, list) else rig.tokenizer(each)["input_ids"] for each in prompt] if several else [
        prompt if isinstance(prompt, list) else rig.tokenizer(prompt)["input_ids"]
    ]  # fmt: skip
    answer = client.completions.create(model="tiny/model", prompt=prompt)  # 16 tokens, as in OpenAI's API
    expected = [detokenize(rig.tokenizer, rig.plain(tokens, 16)) for tokens in listed]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(listed)))
    assert answer.object == "text_completion" and answer.id.startswith("cmpl-")
    assert answer.usage is not None and answer.usage.prompt_tokens == sum(map(len, listed))
    said: dict[int, str] = {}
    for piece in client.completions.create(model="tiny/model", prompt=prompt, stream=True):
        for choice in piece.choices:
            said[choice.index] = said.get(choice.index, "") + choice.text
    assert [said[index] for index in range(len(listed))] == expected


def test_without_a_budget_a_chat_goes_on_to_the_end_of_the_context(rig: Any, client: openai.OpenAI) -> None:
    long: Any = [{"role": "user", "content": "x" * 490}]
    answer = client.chat.completions.create(model="tiny/model", messages=long)
    prompt = encode_chat(rig.tokenizer, long)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(rig.plain(prompt, 512 - len(prompt)))


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_both_names_of_the_budget_hold_on_both_paths(rig: Any, path: str, name: str) -> None:
    body = {"messages": CHAT} if "chat" in path else {"prompt": "Once"}
    answer = httpx.post(f"{rig.url}/v1/{path}", json={**body, name: 3, "ignore_eos": True})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_seeds_make_samples_reproducible_with_drafts_and_without(client: openai.OpenAI) -> None:
    def ask(**settings: Any) -> list[str]:
        answer = client.completions.create(
            model="tiny/model", prompt="Once", max_tokens=12, temperature=0.9, **settings
        )
        return [choice.text for choice in answer.choices]

    first = ask(seed=5, n=3)
    assert ask(seed=5, n=3, extra_body={"speculative": False}) == first == [*ask(seed=5), *ask(seed=6), *ask(seed=7)]
    assert len(set(first)) == 3
    for seed in (-5, -(2**63), -1):
        assert ask(seed=seed) == ask(seed=seed)
    apart = [ask(seed=seed)[0] for seed in (-1, 2**63 - 1, -(2**63), 0)]  # a wrapped seed would repeat another's text
    assert len(set(apart)) == 4
    assert ask() != ask()  # drawn


def test_top_k_top_p_and_min_p_are_honoured(rig: Any, client: openai.OpenAI) -> None:
    greedy = client.completions.create(model="tiny/model", prompt="Once").choices[0].text
    for narrow in ({"extra_body": {"top_k": 1}}, {"top_p": 1e-6}, {"extra_body": {"min_p": 1}}):
        sampled = client.completions.create(model="tiny/model", prompt="Once", temperature=1.0, **narrow)
        assert sampled.choices[0].text == greedy
    wide = client.completions.create(
        model="tiny/model", prompt="Once", temperature=1.0, seed=3, extra_body={"top_k": -1}
    )
    assert wide.choices[0].text != greedy


def test_the_servers_defaults_hold_where_a_request_names_none(rig: Any) -> None:
    from aurora_rl.envs import SamplingParams

    url = rig.serve(sampling_params=SamplingParams(temperature=1.0, top_k=1))
    body = {"prompt": "Once", "max_tokens": 16}
    texts = [
        httpx.post(f"{where}/v1/completions", json=body | more).json()["choices"][0]["text"]
        for where, more in [(rig.url, {}), (url, {}), (url, {"top_k": 0, "seed": 3})]
    ]
    assert texts[0] == texts[1] != texts[2]


def test_stop_strings_end_the_text_before_them(rig: Any, client: openai.OpenAI) -> None:
    text = detokenize(rig.tokenizer, rig.plain(rig.tokenizer("Once")["input_ids"], 40))
    stop = next(text[at : at + 2] for at in range(10, 30) if "\ufffd" not in text[at : at + 2])
    for stops in (stop, ["never there", stop]):
        whole = client.completions.create(model="tiny/model", prompt="Once", max_tokens=40, stop=stops)
        said, pieces = stream_of(
            client.completions.create(model="tiny/model", prompt="Once", max_tokens=40, stop=stops, stream=True)
        )
        assert whole.choices[0].text == said == text[: text.index(stop)]
        assert whole.choices[0].finish_reason == pieces[-1].choices[0].finish_reason == "stop"


def expected_logprobs(rig: Any, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits = rig.target(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def test_log_probabilities_of_a_chat_are_the_targets(rig: Any, client: openai.OpenAI) -> None:
    prompt = encode_chat(rig.tokenizer, CHAT)
    tokens = rig.plain(prompt, 12)
    settings: Any = {"model": "tiny/model", "messages": CHAT, "max_tokens": 12, "logprobs": True, "top_logprobs": 2}
    found = client.chat.completions.create(**settings).choices[0].logprobs
    assert found is not None and found.content is not None
    for row, token, each in zip(expected_logprobs(rig, prompt, tokens), tokens, found.content, strict=True):
        assert each.logprob == pytest.approx(float(row[token]), abs=1e-4)
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
        assert each.token == rig.tokenizer.decode([token])
    pieces = client.chat.completions.create(**settings, stream=True)
    streamed = [each for piece in pieces for c in piece.choices if c.logprobs for each in c.logprobs.content or []]
    assert streamed == found.content
    alone = client.chat.completions.create(**{**settings, "top_logprobs": None}).choices[0].logprobs
    assert alone is not None and [each.top_logprobs for each in alone.content or []] == [[]] * len(tokens)


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_an_answer_is_built_next_to_the_event_loop_and_a_choice_at_a_time(
    rig: Any, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    threads = set()

    def spell(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return token_bytes(*args)

    monkeypatch.setattr(front, "token_bytes", spell)
    url, chat = rig.serve(), path.startswith("chat")
    asked: dict[str, Any] = {"messages": CHAT, "logprobs": True, "top_logprobs": 3} if chat else {"prompt": "Once"}
    asked = {"logprobs": 3, **asked, "n": 2, "max_tokens": 18, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/{path}", json=asked, timeout=30)
    assert all(name.startswith("tokenizer_") for name in threads) and threads
    assert int(answer.headers["content-length"]) == len(answer.content)
    body = answer.json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1] and body["usage"]["completion_tokens"] == 36
    alone = httpx.post(f"{url}/v1/{path}", json={**asked, "n": 1, "seed": 2}, timeout=30).json()
    assert alone["choices"] == [{**body["choices"][1], "index": 0}]


def test_json_is_encoded_in_parts() -> None:
    value = {"a": [{"b": [1.5] * 40}] * 40, "é": {"c": [], "d": {}, "e": [None] * 33}, "f": 'q"'}
    parts = list(encoded(value))
    assert json.loads("".join(parts)) == value
    assert max(part.count("b") for part in parts) == 16  # no other thread runs while one part is encoded
    with pytest.raises(ValueError, match="not JSON compliant"):
        list(encoded({"a": float("nan")}))


def test_bytes_of_tokens_spell_the_text(client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny/model", "messages": CHAT, "max_tokens": 40, "logprobs": True}
    choice = client.chat.completions.create(**settings).choices[0]
    assert choice.logprobs is not None
    spelt = b"".join(bytes(each.bytes or []) for each in choice.logprobs.content or [] if each.token != "<eos>")
    assert spelt.decode(errors="replace").replace("<user>", "").replace("<assistant>", "") == choice.message.content


def test_log_probabilities_of_a_completion_have_offsets(rig: Any, client: openai.OpenAI) -> None:
    settings: Any = {"model": "tiny/model", "prompt": "Once", "max_tokens": 12, "logprobs": 2}
    found = client.completions.create(**settings).choices[0].logprobs
    assert found is not None and found.tokens and found.text_offset and found.top_logprobs
    assert found.text_offset == [len("".join(found.tokens[:index])) for index in range(12)]
    assert all(found.tokens[index] in top for index, top in enumerate(found.top_logprobs))
    streamed: dict[str, list[Any]] = {}
    for piece in client.completions.create(**settings, stream=True):
        for name, values in piece.choices[0].logprobs or {}:
            streamed.setdefault(name, []).extend(values)
    assert streamed == {name: values for name, values in found}


def test_unlikely_tokens_have_a_finite_logprob(rig: Any) -> None:
    from aurora_rl.envs.request import TokenLogprobs
    from aurora_rl.serving.http.bodies import ChatBodies

    bodies = ChatBodies(
        "m", rig.tokenizer, spell=lambda token: ("x", [120]), num_spec_tokens=lambda: 0, drafter_version=lambda: 0
    )
    found = bodies.logprobs([3], [TokenLogprobs(-math.inf, [])])
    assert found["content"][0]["logprob"] == -9999.0


def test_a_request_may_keep_out_of_learning(rig: Any) -> None:
    rig.idle()
    url, body = f"{rig.url}/v1/completions", {"prompt": "ab", "max_tokens": 2}
    counts = []
    for more, headers in [
        ({}, {}), ({"learn": False}, {}), ({}, {"X-Aurora-Learn": "false"}), ({"learn": True}, {"X-Aurora-Learn": "0"}),
    ]:  # fmt: skip
        before = len(rig.learned)
        assert httpx.post(url, json=body | more, headers=headers).status_code == 200
        counts.append(len(rig.learned) - before)
    assert counts == [1, 0, 0, 1]


def test_a_header_turns_speculation_off(rig: Any) -> None:
    url, body = f"{rig.url}/v1/completions", {"prompt": "abab", "max_tokens": 12}
    plain, drafted = (
        httpx.post(url, json=body, headers={"X-Aurora-Speculative": value}).json() for value in ("False", "1")
    )
    assert plain["choices"][0]["text"] == drafted["choices"][0]["text"]
    steps = [each["metrics"]["speculative_decoding"]["num_spec_steps"] for each in (plain, drafted)]
    assert steps[0] == 0 < steps[1]


def test_content_in_parts_and_null_content_are_taken(rig: Any) -> None:
    def ask(messages: list[Any]) -> str:
        answer = httpx.post(f"{rig.url}/v1/chat/completions", json={"messages": messages, "max_tokens": 12})
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["message"]["content"]

    parts = [{"type": "text", "text": "Hi,"}, {"type": "text", "text": "you"}]
    assert ask([{"role": "user", "content": parts}]) == ask([{"role": "user", "content": "Hi,\nyou", "name": "me"}])
    echoed = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [], "annotations": []}
    turn = {"role": "user", "content": "ok"}
    assert ask([turn, echoed, turn]) == ask([turn, {"role": "assistant", "content": ""}, turn])
    rules = "Be brief."
    assert ask([{"role": "developer", "content": rules}, turn]) == ask([{"role": "system", "content": rules}, turn])


def test_many_clients_at_once_get_their_own_answers(rig: Any) -> None:
    prompts = [f"prompt {number}" for number in range(8)]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{rig.url}/v1", api_key="none", max_retries=0) as client:

            async def one(number: int) -> str:
                if number % 2:
                    answer = await client.completions.create(model="tiny/model", prompt=prompts[number], max_tokens=16)
                    return answer.choices[0].text
                pieces = await client.completions.create(
                    model="tiny/model", prompt=prompts[number], max_tokens=16, stream=True
                )
                return "".join([choice.text async for piece in pieces for choice in piece.choices])

            return await asyncio.wait_for(asyncio.gather(*map(one, range(len(prompts)))), 60)

    expected = [detokenize(rig.tokenizer, rig.plain(rig.tokenizer(prompt)["input_ids"], 16)) for prompt in prompts]
    assert asyncio.run(ask()) == expected


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_gets_an_answer(rig: Any) -> None:
    command = ["curl", "-sN", "--max-time", "30", f"{rig.url}/v1/chat/completions"]
    headers = ["-H", "Content-Type: application/json"]
    body = {"model": "tiny/model", "messages": CHAT, "max_tokens": 8}
    out = subprocess.run([*command, *headers, "-d", json.dumps(body)], capture_output=True, timeout=60, check=True)
    text = json.loads(out.stdout)["choices"][0]["message"]["content"]
    body["stream"] = True
    out = subprocess.run([*command, *headers, "-d", json.dumps(body)], capture_output=True, timeout=60, check=True)
    assert out.stdout.endswith(b"data: [DONE]\n\n")
    pieces = [json.loads(line[6:]) for line in out.stdout.splitlines() if line.startswith(b"data: {")]
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == text


def test_tokens_of_texts_and_chats(rig: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        answer = httpx.post(f"{rig.url}{path}", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    tokens = tokenizer("caffé")["input_ids"]
    found = post("/tokenize", {"model": "tiny/model", "prompt": "caffé", "return_token_strs": True})
    assert found == {
        "count": len(tokens), "max_model_len": 512, "tokens": tokens,
        "token_strs": tokenizer.convert_ids_to_tokens(tokens),
    }  # fmt: skip
    assert post("/tokenize", {"messages": CHAT})["tokens"] == encode_chat(tokenizer, CHAT)
    assert post("/tokenize", {"prompt": "a", "add_special_tokens": False})["token_strs"] is None
    assert post("/detokenize", {"tokens": [*tokens, tokenizer.eos_token_id]}) == {"prompt": "caffé<eos>"}


def test_models_health_and_info(rig: Any, client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("tiny/model", "model", "aurora-rl")
    assert card == client.models.retrieve("tiny/model") and card.max_model_len == 512  # type: ignore[attr-defined]
    assert httpx.get(f"{rig.url}/health").status_code == 200
    before = len(rig.learned)
    assert httpx.get(f"{rig.url}/health_generate", timeout=30).status_code == 200
    assert len(rig.learned) == before
    url = rig.serve(drafter_version=lambda: 7)
    info = httpx.get(f"{url}/server_info").json()
    assert info["model"] == "tiny/model" and info["drafter_version"] == 7
    assert info["num_running"] == info["num_waiting"] == 0 and info["max_model_len"] == 512


def test_the_client_on_the_serving_page(rig: Any, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "serving.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    names: dict[str, Any] = {}
    exec(code.replace("http://127.0.0.1:8000", rig.url), names)
    names["client"].close()
    messages = [{"role": "user", "content": "Write a haiku about rivers."}]
    whole = httpx.post(f"{rig.url}/v1/chat/completions", json={"messages": messages}, timeout=60).json()
    assert capsys.readouterr().out == whole["choices"][0]["message"]["content"] != ""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from aurora_rl.workload import traffic
from aurora_rl.workload.request_fields import HARMLESS, NEUTRAL
from aurora_rl.workload.traffic import Prompt, TrafficError, generate_traffic, read_jsonl

GOOD = '{"messages": [{"role": "user", "content": "Hi"}]}'


def write(folder: Path, *lines: str | bytes) -> Path:
    path = folder / "requests.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


# ---- files ------------------------------------------------------------------------------------------------------


def test_a_file_is_read_in_order(tmp_path: Path) -> None:
    full = {
        "id": "a",
        "domain": "chat",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé\u2028?"}],
        "follow_ups": ["And then?", "Why?"],
        "source": "a column of the user's own",
    }
    path = write(tmp_path, json.dumps(full, ensure_ascii=False), "", GOOD, GOOD.replace("{", '{"id": 7, ', 1), "")
    user = ({"role": "user", "content": "Hi"},)
    assert read_jsonl(path) == [
        Prompt("a", "chat", tuple(full["messages"]), ("And then?", "Why?")),
        Prompt("line-3", "", user),
        Prompt("7", "", user),
    ]


def test_a_line_may_say_how_it_is_sampled(tmp_path: Path) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 2**63 - 1}
    lines: list[dict[str, Any]] = [
        {"max_tokens": 7, **sampling, "stop": ["\n", "END"]},
        {"max_completion_tokens": 7, "temperature": 0, "stop": "END"},
        {"max_tokens": 3, "max_completion_tokens": 3, "seed": None, "stop": None},
    ]
    user = {"messages": [{"role": "user", "content": "Hi"}]}
    prompts = read_jsonl(write(tmp_path, *(json.dumps(user | line) for line in lines)))
    assert [p.max_tokens for p in prompts] == [7, 7, 3]
    assert [p.sampling for p in prompts] == [sampling, {"temperature": 0}, {}]
    assert [p.stop for p in prompts] == [("\n", "END"), ("END",), ()]


def test_a_line_may_say_how_it_is_served(tmp_path: Path) -> None:
    lines = ["{", '{"speculative": false, ', '{"learn": false, ', '{"speculative": true, "learn": null, ']
    prompts = read_jsonl(write(tmp_path, *(GOOD.replace("{", line, 1) for line in lines)))
    assert [(p.speculative, p.learn) for p in prompts] == [(True, True), (False, True), (True, False), (True, True)]


def test_a_line_may_have_a_salt(tmp_path: Path) -> None:
    lines = ["{", '{"cache_salt": "tenant-7", ', '{"cache_salt": null, ']
    prompts = read_jsonl(write(tmp_path, *(GOOD.replace("{", line, 1) for line in lines)))
    assert [p.cache_salt for p in prompts] == [None, "tenant-7", None]


OF_HTTP = {
    "n": 2, "logprobs": True, "top_logprobs": 3, "stream": True, "stream_options": {}, "prompt": "a",
}  # fmt: skip


@pytest.mark.parametrize("field", [*NEUTRAL, *OF_HTTP])
def test_what_would_change_the_answer_and_is_not_supported_is_refused(tmp_path: Path, field: str) -> None:
    line = json.dumps(json.loads(GOOD) | {field: OF_HTTP.get(field, [{"type": "function"}])})
    with pytest.raises(
        TrafficError, match=rf"requests\.jsonl, line 2: {field} is not supported by traffic files: leave it out"
    ):
        read_jsonl(write(tmp_path, GOOD, line))


def test_what_changes_nothing_is_ignored(tmp_path: Path) -> None:
    neutral = {field: values[0] if values else None for field, values in NEUTRAL.items()}
    neutral |= {"n": 1, "logprobs": False, "top_logprobs": 0, "stream": False, "model": "served"}
    own = dict.fromkeys(["clean", "source", "ids", "mode", "names"], "x")
    lines = [neutral, dict.fromkeys([*NEUTRAL, *OF_HTTP]), dict.fromkeys(HARMLESS, "x"), own]
    user = json.loads(GOOD)
    prompts = read_jsonl(write(tmp_path, *(json.dumps(user | line) for line in lines)), model="served")
    assert prompts == [Prompt(f"line-{number}", "", tuple(user["messages"])) for number in range(1, 5)]


def test_another_model_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, GOOD.replace("{", '{"model": "gpt-4", ', 1))
    with pytest.raises(TrafficError, match="line 2: model is 'gpt-4', and this run serves 'smollm2'; leave it out"):
        read_jsonl(path, model="smollm2")
    with pytest.raises(TrafficError, match="line 2: model is 'gpt-4'; leave it out"):
        read_jsonl(path)


def test_a_line_is_what_a_body_would_be(tmp_path: Path) -> None:
    line = {
        "messages": [
            {"role": "developer", "content": "Be brief.", "name": "rules"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
        "top_k": -1, "seed": -1, "ignore_eos": True,
    }  # fmt: skip
    (prompt,) = read_jsonl(write(tmp_path, json.dumps(line)))
    assert prompt.sampling == {"top_k": -1, "seed": -1, "ignore_eos": True}
    assert prompt.messages == (
        {"role": "system", "content": "Be brief.", "name": "rules"}, {"role": "user", "content": "a\nb"},
    )  # fmt: skip


def test_limit_and_shuffle(tmp_path: Path) -> None:
    path = write(tmp_path, *[GOOD] * 50)
    ids = [f"line-{n}" for n in range(1, 51)]
    assert [p.id for p in read_jsonl(path, limit=3)] == ids[:3]
    assert [p.id for p in read_jsonl(path, limit=99)] == ids
    shuffled = [p.id for p in read_jsonl(path, shuffle=True, seed=1)]
    assert shuffled != ids
    assert sorted(shuffled) == sorted(ids)
    assert [p.id for p in read_jsonl(path, shuffle=True, seed=1, limit=5)] == shuffled[:5]
    assert [p.id for p in read_jsonl(path, shuffle=True, seed=2)] != shuffled
    with pytest.raises(TrafficError, match="limit on requests is 0; it must be 1 or more"):
        read_jsonl(path, limit=0)


def message(**keys: Any) -> str:
    return json.dumps({"messages": [{"role": "user", "content": "Hi"} | keys]})


def turn(**keys: Any) -> str:
    return json.dumps({"conversations": [keys]})


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"messages": [', "not valid JSON: Expecting value at character 15"),
        ("[" * 100_000, "not valid JSON: nested too deeply"),
        ("[1]", "expected an object with 'messages', got [1]"),
        ("null", "expected an object with 'messages', got null"),
        ('{"prompt": "Hi"}', "messages is missing"),
        (turn(**{"from": "bing"}), 'conversations[0].from is "bing"; give one of system, human, gpt'),
        (turn(**{"from": "gpt"}), "conversations[0].value is missing"),
        (turn(**{"from": "gpt", "value": 3}), "conversations[0].value is 3; give a string"),
        (turn(role="gpt", content=""), 'conversations[0].role is "gpt"; give one of'),
        ('{"conversations": [{"from": "gpt", "value": "", "a": 1}]}', "unknown field 'conversations[0].a'"),
        ('{"conversations": "Hi"}', 'conversations is "Hi"; give a list with at least one message'),
        (GOOD.replace("{", '{"conversations": [], ', 1), "messages and conversations are both given; give one of them"),
        ('{"messages": []}', "messages is []; give a list with at least one message"),
        ('{"message": []}', "unknown key 'message'; did you mean 'messages'"),
        (GOOD.replace("{", '{"followups": [], ', 1), "unknown key 'followups'; did you mean 'follow_ups'"),
        (GOOD.replace("{", '{"follow_ups": [1], ', 1), "'follow_ups' must be a list of strings, got [1]"),
        (GOOD.replace("{", '{"follow_ups": "Why?", ', 1), "'follow_ups' must be a list of strings, got "),
        (GOOD.replace("{", '{"max_token": 3, ', 1), "unknown key 'max_token'; did you mean 'max_tokens'"),
        (GOOD.replace("{", '{"Top-P": 0.5, ', 1), "unknown key 'Top-P'; did you mean 'top_p'"),
        (GOOD.replace("{", '{"learn": "no", ', 1), 'learn is "no"; give true or false'),
        (GOOD.replace("{", '{"cache_salt": "a/b", ', 1), 'cache_salt is "a/b"; give a string of 1 to 128 characters'),
        (GOOD.replace("{", '{"cache_salt": 7, ', 1), "cache_salt is 7; give a string of 1 to 128 characters"),
        (GOOD.replace("{", '{"cache-salt": "a", ', 1), "unknown key 'cache-salt'; did you mean 'cache_salt'"),
        (GOOD.replace("{", '{"max_tokens": 0, ', 1), "max_tokens is 0; give an integer >= 1"),
        (GOOD.replace("{", '{"max_completion_tokens": 2.5, ', 1), "max_completion_tokens is 2.5; give an integer"),
        (
            GOOD.replace("{", '{"max_tokens": 3, "max_completion_tokens": 4, ', 1),
            "max_tokens and max_completion_tokens differ; give one of them",
        ),
        (GOOD.replace("{", '{"temperature": -1, ', 1), "temperature is -1; give a finite number >= 0"),
        (GOOD.replace("{", '{"temperature": "hot", ', 1), 'temperature is "hot"; give a number'),
        (GOOD.replace("{", '{"top_p": 0, ', 1), "top_p is 0; give a number with 0 < top_p <= 1"),
        (GOOD.replace("{", '{"top_k": 1.5, ', 1), "top_k is 1.5; give an integer"),
        (
            GOOD.replace("{", '{"seed": 9223372036854775808, ', 1),
            "seed is 9223372036854775808; give an integer with -2**63 <= seed",
        ),
        (GOOD.replace("{", '{"stop": [""], ', 1), 'stop has ""; give strings that are not empty'),
        (GOOD.replace("{", '{"stop": {}, ', 1), "stop is {}; give a string, or a list of strings"),
        (GOOD.replace("{", '{"id": true, ', 1), "'id' must be a string or an integer, got true"),
        (GOOD.replace("{", '{"domain": 3, ', 1), "'domain' must be a string, got 3"),
        ('{"messages": ["Hi"]}', "messages[0] is \"Hi\"; give an object with 'role' and 'content'"),
        (message(tool_calls=[3]), "messages[0].tool_calls is not supported by traffic files: leave it out"),
        (message(age=3), "unknown field 'messages[0].age'"),
        (message(role="human"), 'messages[0].role is "human"; give one of system, developer, user, assistant'),
        (message(role="tool"), 'messages[0].role is "tool"; give another one'),
        (message(role="tool", tool_call_id="a"), 'messages[0].role is "tool"; give another one'),
        (message(role=["user"]), 'messages[0].role is ["user"]; give one of'),
        (message(content=None), "messages[0].content is missing"),
        (
            message(content="\ud800"),
            "not valid JSON: a text has '\\ud800', half a surrogate pair, which no tokenizer takes; remove it",
        ),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str | bytes, wrong: str) -> None:
    path = write(tmp_path, GOOD, "", line, GOOD)
    with pytest.raises(TrafficError, match=rf"requests\.jsonl, line 3: {re.escape(wrong)}"):
        read_jsonl(path, limit=1)  # the whole file is checked


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (gzip.compress(GOOD.encode()), 1),
        (f"{GOOD}\n".encode("utf-16"), 1),
        (f"{GOOD}\n".encode("utf-16-le"), 1),
        (f"{GOOD}\n{GOOD.replace('Hi', 'Né')}\n".encode("latin-1"), 2),
    ],
    ids=["gzip", "UTF-16", "UTF-16 without its mark", "Latin-1"],
)
def test_a_file_that_is_not_utf_8(tmp_path: Path, content: bytes, line: int) -> None:
    with pytest.raises(TrafficError, match=rf"requests.jsonl is not UTF-8 \(in line {line}\); save it as UTF-8, and"):
        read_jsonl(write(tmp_path, content))


def test_conversations_of_public_data_are_messages(tmp_path: Path) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = [*asked, {"role": "assistant", "content": "Hello"}]
    turns = [{"from": who, "value": m["content"]} for who, m in zip(("system", "human", "gpt"), chat, strict=True)]
    lines = [
        json.dumps({"id": str(id), "conversations": each, "conversation_id": 3})
        for id, each in enumerate((chat, turns))
    ]
    assert [list(prompt.messages) for prompt in read_jsonl(write(tmp_path, *lines))] == [chat, chat]


def test_what_is_empty_is_the_templates_to_refuse(tmp_path: Path) -> None:
    (prompt,) = read_jsonl(write(tmp_path, message(content="").replace("{", '{"follow_ups": [""], ', 1)))
    assert prompt.messages == ({"role": "user", "content": ""},) and prompt.follow_ups == ("",)


def test_all_bad_lines_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        TrafficError, match=r"requests\.jsonl, line 2: not valid .*; line 4: expected an object .*, got \[\]$"
    ):
        read_jsonl(write(tmp_path, GOOD, "{", GOOD, "[]"))
    with pytest.raises(TrafficError, match=r"line 20: [^;]*; and 5 more$"):
        read_jsonl(write(tmp_path, *["[]"] * 25))


def test_an_id_used_twice(tmp_path: Path) -> None:
    line = GOOD.replace("{", '{"id": "a", ', 1)
    with pytest.raises(TrafficError, match="line 2: id 'a' was already used in line 1"):
        read_jsonl(write(tmp_path, line, line))


def test_a_file_that_has_nothing(tmp_path: Path) -> None:
    with pytest.raises(TrafficError, match="holds no requests"):
        read_jsonl(write(tmp_path, "", "  "))
    with pytest.raises(TrafficError, match="cannot read requests from .*missing.jsonl: No such file"):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(TrafficError, match="Is a directory"):
        read_jsonl(tmp_path)


# ---- the generator ----------------------------------------------------------------------------------------------


def text(prompt: Prompt) -> str:
    (message,) = prompt.messages
    assert message["role"] == "user"
    return message["content"]


def pieces(value: Any) -> Iterator[str]:
    """A value, or the parts of one that has parts, such as the columns of a table."""
    if isinstance(value, str):
        yield value
    else:
        yield from value


class Filled(NamedTuple):
    """A generated request, and what it was generated from."""

    prompt: Prompt
    template: str
    values: dict[str, Any]


@pytest.fixture(scope="module")
def stream() -> list[Filled]:
    return [Filled(*each) for each in traffic._generate(2000, 0, traffic.DOMAINS, True)]


def test_no_prompt_repeats(stream: list[Filled]) -> None:
    for texts in ([text(f.prompt) for f in stream], [f.prompt.id for f in stream]):
        assert len(set(texts)) == len(stream)


def test_the_last_quarter_uses_templates_and_values_not_seen_before(stream: list[Filled]) -> None:
    begin = traffic.unseen_from(2000)
    first, last = stream[:begin], stream[begin:]
    assert len(last) == 500
    assert not {f.template for f in first} & {f.template for f in last}
    seen, kept = ({p for f in part for value in f.values.values() for p in pieces(value)} for part in (first, last))
    assert not seen & kept
    # The record of values is honest: each stands in the text, and none of the kept words slipped into the first part.
    for filled in stream:
        assert filled.prompt.id.startswith(filled.template)
        for value in filled.values.values():
            assert any(piece in text(filled.prompt) for piece in pieces(value))
    everything = "\n".join(text(f.prompt) for f in first)
    words = [word for word in kept if len(word) > 3 and not word[0].isdigit()]
    assert len(words) > 100
    assert [word for word in words if re.search(rf"\b{re.escape(word)}\b", everything)] == []


def test_domains_have_equal_shares_and_interleave(stream: list[Filled]) -> None:
    domains = [f.prompt.domain for f in stream]
    assert Counter(domains[:1500]) == dict.fromkeys(["code", "sql", "math", "finance", "chat"], 300)
    assert set(Counter(domains[1500:]).values()) == {100}
    # At random: two neighbours share their domain about one time in five.
    assert 0.15 < sum(a == b for a, b in zip(domains, domains[1:], strict=False)) / 1999 < 0.25
    # And no template dominates its domain, although some have thousands of values and some a few dozen.
    assert max(Counter(f.template for f in stream).values()) <= 35


def test_the_seed_decides() -> None:
    assert generate_traffic(300, seed=3) == generate_traffic(300, seed=3)
    assert generate_traffic(300, seed=3) != generate_traffic(300, seed=4)


@pytest.mark.parametrize("num_requests", [1, 3, 4, 5, 39])
def test_short_streams(num_requests: int) -> None:
    prompts = generate_traffic(num_requests)
    assert len({text(p) for p in prompts}) == num_requests
    counts = Counter(p.domain for p in prompts[: num_requests - num_requests // 4])
    assert max(counts.values()) - min(counts.values()) <= 1


def test_as_many_as_can_be_distinct_and_not_one_more() -> None:
    most = traffic._most_requests(traffic.DOMAINS, True)
    assert most > 5000
    assert len({text(p) for p in generate_traffic(most)}) == most
    with pytest.raises(TrafficError, match=rf"asked for {most + 1} requests; the generator has {most} distinct ones"):
        generate_traffic(most + 1)
    with pytest.raises(TrafficError, match="asked for 0 requests; the number must be 1 or more"):
        generate_traffic(0)

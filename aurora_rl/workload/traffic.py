"""Traffic: where requests come from, a JSONL file or the built-in generator."""

from __future__ import annotations

import difflib
import functools
import math
import os
import random
import string
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aurora_rl.workload.pools import POOLS
from aurora_rl.workload.request_fields import HARMLESS, NEUTRAL, FieldError, check_fields
from aurora_rl.workload.request_values import (
    BUDGETS,
    SAMPLING,
    ChatMessage,
    as_json,
    boolean_field,
    cache_salt_field,
    chat_messages,
    missing,
    parse_json,
    sampling_fields,
    string_field,
    wrong,
)
from aurora_rl.workload.templates import TEMPLATES

_OURS = ("messages", "id", "domain", "follow_ups", "speculative", "learn", "cache_salt", *BUDGETS, *SAMPLING)
_KEYS = (*_OURS, "conversations", "model")
# A line asks for one answer to one chat, a text: what a server takes beyond that has no place in a file.
_OF_HTTP: Mapping[str, tuple[Any, ...]] = {
    "prompt": (), "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "stream": (False,), "stream_options": (),
}  # fmt: skip
_SPEAKERS = {"system": "system", "human": "user", "gpt": "assistant"}  # of ShareGPT
DOMAINS = tuple(TEMPLATES)
"""Subjects of the built-in traffic."""


_BY = "traffic files"
_MAX_TOLD = 20  # bad lines that an error names


class TrafficError(ValueError):
    """Requests cannot be served; the message names the file and line, or the setting, and what is wrong."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One conversation to serve.

    Attributes:
        id: Name, unique within its traffic. The generator's begins with the name of the template.
        domain: Subject of the request, by which metrics are grouped. Empty if the file has none.
        messages: First turn, each message with `role`, `content` and perhaps `name`.
        follow_ups: The user's further turns, each sent after the answer to the turn before.
        max_tokens: Token budget of each completion; None takes the configuration's.
        sampling: Values of temperature, top_p, top_k, min_p, seed and ignore_eos that differ from the configuration's.
        stop: Strings that end a completion.
        speculative: Whether drafts are verified for it.
        learn: Whether the learner may see it.
        cache_salt: Key of what requests share, see :class:`~aurora_rl.envs.Request`.
    """

    id: str
    domain: str
    messages: tuple[ChatMessage, ...]
    follow_ups: tuple[str, ...] = ()
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    speculative: bool = True
    learn: bool = True
    cache_salt: str | None = None


# ---- from a file ------------------------------------------------------------------------------------------------


def read_jsonl(
    path: str | os.PathLike[str],
    *,
    limit: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
    model: str | None = None,
) -> list[Prompt]:
    """Read requests from a JSONL file.

    A line is `{"messages": [{"role": ..., "content": ...}, ...]}`; docs/quickstart.md lists the keys that it may have.
    Public data's `{"conversations": [{"from": "human", "value": ...}, ...]}` is read, too.
    Fields of OpenAI's requests are checked as in a body of /v1/chat/completions. What would change the answer and is
    not supported is refused. Blank lines and other keys are skipped. The whole file is checked, whatever the limit, so
    that a run never meets a bad line half way.

    Args:
        path: File, in UTF-8.
        limit: Most requests to return; None returns all.
        shuffle: Whether to return them in random order; a limit is then applied to the shuffled order.
        seed: Seed of that order.
        model: Name of the served model, the only one that a line may name; None takes no line that names one.

    Returns:
        The requests. One without an id is called `line-<number>`.

    Raises:
        TrafficError: The file is missing, unreadable or without requests, an id is used twice, the limit is below 1, or
            lines are malformed. The message names the file and the lines, the first twenty.
    """
    if limit is not None and limit < 1:
        raise TrafficError(f"the limit on requests is {limit}; it must be 1 or more")
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise TrafficError(f"cannot read requests from {path}: {error.strerror or error}") from error
    # At once, and not line by line: every line of a compressed file or one in UTF-16 would be named.
    if (bad_line := _not_utf8(text)) is not None:
        raise TrafficError(f"{path} is not UTF-8 (in line {bad_line}); save it as UTF-8, and not compressed")
    lines = text.splitlines()

    prompts: list[Prompt] = []
    seen: dict[str, int] = {}
    bad: list[tuple[int, ValueError]] = []  # the first of them
    num_bad = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            prompt = _parse(line, number, model)
            if prompt.id in seen:
                raise ValueError(f"id {prompt.id!r} was already used in line {seen[prompt.id]}")
        except ValueError as error:  # json's and UTF-8's errors are ValueErrors too
            num_bad += 1
            if len(bad) < _MAX_TOLD:  # an error holds its line and its frames
                bad.append((number, error))
            continue
        seen[prompt.id] = number
        prompts.append(prompt)
    if bad:
        more = f"; and {num_bad - _MAX_TOLD} more" if num_bad > _MAX_TOLD else ""
        told = "; ".join(f"line {number}: {error}" for number, error in bad)
        raise TrafficError(f"{path}, {told}{more}") from bad[0][1]
    if not prompts:
        raise TrafficError(f"{path} holds no requests")

    if shuffle:
        random.Random(seed).shuffle(prompts)
    return prompts[:limit]


def _not_utf8(text: bytes) -> int | None:
    """Return the number of the first line that is not UTF-8; None if all are. UTF-16 may be UTF-8 of zeros."""
    try:
        text.decode()
        place = text.find(b"\0")
    except UnicodeDecodeError as error:
        place = error.start
    return None if place < 0 else 1 + text.count(b"\n", 0, place)


def _parse(line: bytes, number: int, model: str | None) -> Prompt:
    """Turn one line into a prompt, or raise ValueError with what is wrong with it."""
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"expected an object with 'messages', got {as_json(record)}")
    # Files carry columns of their own, which are ignored; a misspelt one of ours must not be. A cutoff of 0.8 would
    # take the column "clean" for "learn".
    columns = record.keys() - {*_KEYS, *HARMLESS, *NEUTRAL, *_OF_HTTP}
    for key in columns:
        if close := difflib.get_close_matches(key.lower().replace("-", "_"), _OURS, n=1, cutoff=0.81):
            raise ValueError(f"unknown key {key!r}; did you mean {close[0]!r}?")
    fields = check_fields(record, (*_KEYS, *_OF_HTTP), harmless={*HARMLESS, *columns}, by=_BY)
    messages = _messages(fields)
    fields = check_fields(fields, _KEYS, neutral=_OF_HTTP, by=_BY)
    if (named := string_field(fields, "model")) not in (None, model):
        serves = "" if model is None else f", and this run serves {model!r}"
        raise FieldError(f"model is {named!r:.200}{serves}; leave it out", "model")
    identifier, domain = record.get("id", f"line-{number}"), record.get("domain", "")
    if type(identifier) not in (str, int):
        raise ValueError(f"'id' must be a string or an integer, got {as_json(identifier)}")
    if not isinstance(domain, str):
        raise ValueError(f"'domain' must be a string, got {as_json(domain)}")
    follow_ups = record.get("follow_ups", [])
    if not isinstance(follow_ups, list) or not all(isinstance(turn, str) for turn in follow_ups):
        raise ValueError(f"'follow_ups' must be a list of strings, got {as_json(follow_ups)}")
    sampling = sampling_fields(fields)
    stop = sampling.pop("stop", ())
    return Prompt(
        str(identifier),
        domain,
        messages,
        tuple(follow_ups),
        sampling.pop("max_tokens", None),
        sampling,
        (stop,) if isinstance(stop, str) else tuple(stop),
        **{key: boolean_field(fields, key) is not False for key in ("speculative", "learn")},
        cache_salt=cache_salt_field(fields),
    )


def _messages(fields: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    """Return a line's messages. Public data calls them ``conversations``, and may have them in ShareGPT's form."""
    turns = fields.get("conversations")
    if turns is None:
        return chat_messages(fields.get("messages"), by=_BY)
    if fields.get("messages") is not None:
        raise FieldError("messages and conversations are both given; give one of them", "conversations")
    if isinstance(turns, list):
        turns = [_message(turn, f"conversations[{index}].") for index, turn in enumerate(turns)]
    return chat_messages(turns, "conversations", by=_BY)


def _message(turn: Any, where: str) -> Any:
    """Return a turn of ShareGPT's, which has ``from`` and ``value``, as a message; anything else as it is."""
    if not isinstance(turn, dict) or "from" not in turn:
        return turn
    speaker = turn["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise wrong(f"{where}from", speaker, f"give one of {', '.join(_SPEAKERS)}")
    if string_field(turn, "value", where) is None:
        raise missing(f"{where}value")
    further = {name: value for name, value in turn.items() if name not in ("from", "value")}
    return {"role": _SPEAKERS[speaker], "content": turn["value"], **further}


# ---- from the generator -----------------------------------------------------------------------------------------


def generate_traffic(
    num_requests: int, seed: int = 0, *, domains: Sequence[str] = DOMAINS, unseen: bool = True
) -> list[Prompt]:
    """Make varied requests over five domains: code, sql, math, finance and chat.

    A request is a template filled with values. No prompt repeats. The domains have equal shares and come in random
    order. The last quarter of the stream uses templates and values that do not occur before it. So acceptance there
    tells how a drafter does on requests of a kind that it has not learned from.

    Args:
        num_requests: Number of requests.
        seed: The same seed gives the same requests.
        domains: Which of :data:`DOMAINS`.
        unseen: False uses all templates from the first request to the last.

    Returns:
        The requests; each id reads `<domain>-<template>-<position>`.

    Raises:
        TrafficError: Fewer than 1, or more than can be distinct.

    >>> prompts = generate_traffic(100, seed=7)
    >>> len({prompt.messages[0]["content"] for prompt in prompts})
    100
    >>> prompts == generate_traffic(100, seed=7)
    True
    """
    if num_requests < 1:
        raise TrafficError(f"asked for {num_requests} requests; the number must be 1 or more")
    if not domains or (unknown := set(domains) - set(DOMAINS)):
        raise TrafficError(f"domains are {sorted(unknown) if domains else 'empty'}; there are {', '.join(DOMAINS)}")
    most = _most_requests(domains, unseen)
    if num_requests > most:
        raise TrafficError(
            f"asked for {num_requests} requests; the generator has {most} distinct ones; ask for {most} or fewer"
        )
    return [prompt for prompt, _, _ in _generate(num_requests, seed, tuple(domains), unseen)]


def unseen_from(num_requests: int) -> int:
    """Return the position at which the unseen templates and values of so many requests begin.

    >>> unseen_from(300)
    225
    """
    return num_requests - num_requests // 4


class _Template:
    """A text with fields. A field `{pool}` or `{pool2}` takes a value of that pool, `{pool.part}` a part of one.

    Fields of one pool take different values, and every choice of values gives a different text.
    """

    def __init__(self, name: str, text: str, pools: Mapping[str, Sequence[Any]]) -> None:
        self.name, self.text = name, text
        # Pool by pool: its values and the fields that draw from it.
        fields: dict[str, dict[str, None]] = defaultdict(dict)
        for _, place, _, _ in string.Formatter().parse(text):
            if place is not None:
                field = place.partition(".")[0]
                fields[field.rstrip("0123456789")][field] = None
        self._draws = [(pools[pool], tuple(fields[pool])) for pool in sorted(fields)]
        self.size = math.prod(math.perm(len(values), len(group)) for values, group in self._draws)

    def values(self, index: int) -> dict[str, Any]:
        """Return choice `index` of `size`, read as a number of mixed base with a digit for each field."""
        chosen = {}
        for values, group in self._draws:
            left = list(values)
            for entry in group:
                index, digit = divmod(index, len(left))
                chosen[entry] = left.pop(digit)
        return chosen


def _generate(
    num_requests: int, seed: int, domains: Sequence[str], unseen: bool
) -> Iterator[tuple[Prompt, str, dict[str, Any]]]:
    """Yield requests, each with the name of its template and the values in it."""
    rng = random.Random(seed)
    late = num_requests - unseen_from(num_requests) if unseen else 0
    position = 0
    for templates, count in zip(_parts(unseen), (num_requests - late, late), strict=False):
        # A random order of the domains decides who gets the odd ones of an uneven share.
        order = rng.sample(domains, len(domains))
        part: list[tuple[str, _Template, int]] = []
        for place, domain in enumerate(order):
            share = count // len(order) + (place < count % len(order))
            for template, uses in _allot(share, templates[domain], rng):
                # Indices without replacement: no text can come twice, and no draw has to be thrown away.
                part += [(domain, template, index) for index in rng.sample(range(template.size), uses)]
        rng.shuffle(part)
        for domain, template, index in part:
            values = template.values(index)
            message = {"role": "user", "content": template.text.format_map(values)}
            name = f"{domain}-{template.name}"
            yield Prompt(f"{name}-{position:05d}", domain, (message,)), name, values
            position += 1


def _allot(share: int, templates: Sequence[_Template], rng: random.Random) -> list[tuple[_Template, int]]:
    """Share out `share` requests among templates, evenly but for those that have fewer distinct ones to give."""
    # Smallest first, so that what a small one cannot give is spread over all the larger ones.
    order = sorted(rng.sample(templates, len(templates)), key=lambda template: template.size)
    uses = []
    for place, template in enumerate(order):
        uses.append(min(template.size, share // (len(order) - place)))
        share -= uses[-1]
    return list(zip(order, uses, strict=True))


def _most_requests(domains: Sequence[str], unseen: bool) -> int:
    """Return the most requests such that every part of a stream has distinct ones for every domain."""
    most = [len(domains) * min(sum(t.size for t in part[domain]) for domain in domains) for part in _parts(unseen)]
    return min(most[0] * 4 // 3, most[1] * 4 + 3) if unseen else most[0]


def _parts(unseen: bool) -> list[dict[str, list[_Template]]]:
    """Return the templates of the first three quarters of a stream and of the last, or of all in one."""
    early, late = _templates(0), _templates(1)
    return [early, late] if unseen else [{domain: [*early[domain], *late[domain]] for domain in early}]


@functools.cache
def _templates(part: int) -> dict[str, list[_Template]]:
    """Return the templates of every domain: part 0 is the first three quarters of a stream, part 1 the last."""
    pools = {pool: parts[part] for pool, parts in POOLS.items()}
    return {
        domain: [_Template(name, text, pools) for name, text in parts[part].items()]
        for domain, parts in TEMPLATES.items()
    }

"""Prompts of SmolLM2: how long running requests wait for a long one, and what a chat's history costs.

First, one request decodes and a prompt of 900 tokens arrives: the times between two rounds, in units of the median
round before the arrival, with prompts read whole ("whole") and in chunks along with rounds ("chunks"), and how many
tokens the running request gets meanwhile, of those that it gets alone. Second, prompts of 64 tokens wait for four
slots: tokens per second, and the same times. Third, chats of five turns on one slot, each turn with the history before
it: time to the first token, without and with kept rows of finished requests (engine.prefix_cache_tokens). Ways take
turns, so that a machine whose speed drifts treats them alike. --limit is the number of repetitions and of chats;
--cpu-time measures the process's CPU time in place of wall time, on a CPU that is shared with others.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial

import torch
from common import arguments, parse, prompts, write_result
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.envs import Completion, Engine, Request, SamplingParams
from aurora_rl.models.loading import default_dtype, encode_chat, load_target
from aurora_rl.policies import Drafter, TargetParts, TreeShape, get_drafter
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.policies.registry import start_untrained
from aurora_rl.prefix_cache import PrefixCache

TURNS = 5
# Prompts of the second part, their tokens, and the new tokens of each.
SHORT_PROMPTS, SHORT, SHORT_NEW = 16, 64, 40


class Server(SpeculativeDecoder):
    """A decoder of requests that arrive between its rounds."""

    def __init__(self, model: PreTrainedModel, drafter: Drafter | None, depth: int, num_slots: int) -> None:
        self.queue: list[Request] = []
        self.ended: list[Completion] = []
        super().__init__(
            model,
            drafter,
            lambda: self.queue.pop(0) if self.queue else None,
            shape=TreeShape(depth),
            max_length=2048,
            num_slots=num_slots,
            on_completion=self.ended.append,
            record=False,
        )

    def read_prompts_whole(self) -> None:
        """Do as every engine does that cannot stop within a prompt."""
        engine, read = self.engine, self.engine.prefill_chunk
        engine.prefill_chunk = lambda slot, prompt, done, max_tokens: read(slot, prompt, done, len(prompt))
        engine.verify_with_chunk = partial(Engine.verify_with_chunk, engine)


def stall(server: Server, prompt: Tensor, running: Tensor) -> dict[str, float]:
    """Let a long prompt arrive while a request decodes."""
    budget = server.engine.max_length - len(running)
    server.queue = [Request(0, running, SamplingParams(max_tokens=budget))]
    rounds = server.rounds()
    gaps: list[float] = []

    def round() -> None:
        began = time.perf_counter()
        next(rounds)
        gaps.append(time.perf_counter() - began)

    for _ in range(16):
        round()
    usual = statistics.median(gaps[4:])
    server.queue = [Request(1, prompt, SamplingParams(max_tokens=8))]
    gaps.clear()
    while not server.ended:
        round()
    (completion,) = server.ended
    server.ended.clear()
    arrived = gaps[: len(gaps) - len(completion.tokens) + 1]
    return {
        "round_ms": usual * 1e3,
        **spread(gaps, usual),
        "first_token_of_the_prompt_rounds": sum(arrived) / usual,
        "speed_of_the_running_request": len(arrived) * usual / sum(arrived),
    }


def spread(gaps: Sequence[float], usual: float) -> dict[str, float]:
    ordered = sorted(gaps)
    return {
        "longest_gap_rounds": ordered[-1] / usual,
        "p90_gap_rounds": ordered[math.ceil(0.9 * len(ordered)) - 1] / usual,
        "median_gap_rounds": statistics.median(ordered) / usual,
    }


def short_prompts(server: Server, texts: Sequence[Tensor]) -> dict[str, float]:
    """Serve short prompts, four at a time; the first four are read before the first round."""
    # Of several lengths, or all slots would be free at once.
    budgets = [SHORT_NEW - 5 * i % 12 for i in range(len(texts))]
    server.queue = [
        Request(i, text, SamplingParams(max_tokens=budget))
        for i, (text, budget) in enumerate(zip(texts, budgets, strict=True))
    ]
    server.ended.clear()
    rounds, gaps, last = server.rounds(), [], time.perf_counter()
    began = last
    for _ in rounds:
        gaps.append(time.perf_counter() - last)
        last += gaps[-1]
    tokens = sum(len(completion.tokens) for completion in server.ended)
    server.ended.clear()
    usual = statistics.median(gaps[1:16])  # before the first slot is free again
    return {"tokens_per_second": tokens / (last - began), "round_ms": usual * 1e3, **spread(gaps[1:], usual)}


def medians(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}


def first_token(server: Server, prompt: Tensor, sampling: SamplingParams) -> tuple[float, Tensor]:
    """Seconds from the arrival of a prompt to its first token, and the whole completion."""
    server.queue = [Request(0, prompt, sampling)]
    rounds, began = server.rounds(), time.perf_counter()
    next(rounds)
    seconds = time.perf_counter() - began
    for _ in rounds:
        pass
    return seconds, server.ended.pop().tokens


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--length", type=int, default=900, help="tokens of the long prompt")
    parser.add_argument("--drafter", help="architecture that drafts, untrained, such as eagle3; none decodes plainly")
    parser.add_argument("--depth", type=int, default=4, help="tokens that it drafts")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of the process, all threads, in place of wall time"
    )
    options = parse(parser)
    if options.cpu_time:
        time.perf_counter = time.process_time  # the library's own measurement of rounds and chunks included
    torch.set_num_threads(options.threads)
    dtype = default_dtype(options.device)
    model, tokenizer = load_target("smollm2", dtype=dtype, device=options.device)
    drafter = start_untrained(get_drafter(options.drafter), TargetParts.of(model)) if options.drafter else None
    conversations = [prompt.messages for prompt in prompts(options)]
    text = torch.tensor([token for messages in conversations for token in encode_chat(tokenizer, messages)])
    long = text.repeat(options.length // len(text) + 1)[: options.length]
    ways = {name: Server(model, drafter, options.depth, num_slots=2) for name in ("whole", "chunks")}
    ways["whole"].read_prompts_whole()
    waits: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for way in ways.values():
        stall(way, long, text[:64])
    for _ in range(options.limit):
        for name, way in ways.items():
            waits[name].append(stall(way, long, text[:64]))
    stalls = {name: medians(runs) for name, runs in waits.items()}

    four = {name: Server(model, drafter, options.depth, num_slots=4) for name in ways}
    four["whole"].read_prompts_whole()
    parts = long[: len(long) // SHORT * SHORT].split(SHORT)
    shorts = [parts[i % len(parts)] for i in range(SHORT_PROMPTS)]
    served: dict[str, list[dict[str, float]]] = {name: [] for name in four}
    for _ in range(options.limit):
        for name, way in four.items():
            served[name].append(short_prompts(way, shorts))

    both = {name: Server(model, drafter, options.depth, num_slots=1) for name in ("without", "with")}
    cached = both["with"]
    cached.engine.prefix_cache = cache = PrefixCache(8192)
    if cached.policy is not None:
        cached.policy.prefix_cache = PrefixCache(8192)
    sampling = SamplingParams(max_tokens=options.max_new_tokens)
    turns: list[list[dict[str, float]]] = [[] for _ in range(TURNS)]
    for chat in range(len(conversations)):
        history: list[dict[str, str]] = []
        for turn in range(TURNS):
            history += conversations[(chat + turn) % len(conversations)]
            prompt = torch.tensor(encode_chat(tokenizer, history))
            hits, figures = cache.hits, {"prompt_tokens": float(len(prompt))}
            for name, way in both.items():
                seconds, tokens = first_token(way, prompt, sampling)
                figures[f"first_token_ms_{name}"] = seconds * 1e3
            figures["reused_tokens"] = float(cache.hits - hits)
            turns[turn].append(figures)
            history.append({"role": "assistant", "content": str(tokenizer.decode(tokens, skip_special_tokens=True))})
    # The copies alone, of as many tokens.
    rows, copies = cached.engine._rows(0), PrefixCache(8192)
    copied: dict[str, list[float]] = {"save_ms": [], "load_ms": []}
    for _ in range(9):
        copies.clear()
        for name, copy_rows in (("save_ms", copies.save), ("load_ms", copies.load)):
            began = time.perf_counter()
            copy_rows(long, rows)
            copied[name].append((time.perf_counter() - began) * 1e3)
    write_result(
        __file__,
        options,
        {
            "threads": options.threads,
            "clock": "CPU time" if options.cpu_time else "wall time",
            "dtype": str(dtype),
            "drafter": options.drafter,
            "prompt_tokens": options.length,
            "repetitions": options.limit,
            "arrival_of_a_long_prompt": stalls,
            "chunk_tokens": ways["chunks"].env._prefill.chunk,
            "prompts_of_64_tokens": {name: medians(runs) for name, runs in served.items()},
            "chat": [{"turn": number, **medians(turn)} for number, turn in enumerate(turns, 1)],
            "copy_of_the_long_prompt": {name: round(statistics.median(ms), 2) for name, ms in copied.items()},
        },
    )


if __name__ == "__main__":
    main()

"""SGLang with our plugin: what recording costs, how long a swap takes under load, and what speculation gains.

Two servers run side by side, one drafting with --drafter and one plain, and are asked in turns, never at the same time.
On a CPU put tests/sglang_cpu on PYTHONPATH (see the README there); on a GPU nothing is needed but SGLang itself.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import torch
from common import arguments, parse, prompts, write_result

from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.sglang.client import SGLangClient
from aurora_rl.models.loading import default_dtype, embedded_model_path, encode_chat, load_target, stop_token_ids
from aurora_rl.policies import TargetParts
from aurora_rl.policies.formats.files import load_drafter


class Load:
    """Asks an engine for the same completions, again and again."""

    def __init__(self, tokens: list[list[int]], new: int, stop: tuple[int, ...]) -> None:
        self._tokens, self._new, self._stop, self._next = tokens, new, stop, 0

    def run(self, engine: SGLangClient, concurrency: int) -> dict:
        """Tokens a second and accepted drafts, over all prompts."""
        asked = []
        for tokens in self._tokens:
            asked.append(Request(self._next, torch.tensor(tokens), SamplingParams(max_tokens=self._new)))
            self._next += 1
        began = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda request: engine.generate(request, stop_tokens=self._stop), asked))
        seconds = time.perf_counter() - began
        rounds = sum(answer.rounds for answer in answers)
        drafted = sum((count + 1) * n for answer in answers for count, n in answer.accepted.items())
        return {
            "tokens": sum(len(answer.tokens) for answer in answers),
            "seconds": seconds,
            "acceptance_length": drafted / rounds if rounds else None,
            "texts": [answer.tokens.tolist() for answer in answers],
        }

    def keep_busy(self, engine: SGLangClient, number: int, done: threading.Event) -> None:
        """One request after the other, unrecorded."""
        while not done.is_set():
            warm = SamplingParams(max_tokens=2 * self._new)
            engine.generate(Request(10**9 + number, torch.tensor(self._tokens[number]), warm, learn=False))


def rate(runs: list[dict]) -> float:
    return sum(run["tokens"] for run in runs) / sum(run["seconds"] for run in runs)


def swaps(engine: SGLangClient, publisher: WeightPublisher, load: Load, concurrency: int, weights: dict) -> dict:
    """Publish all the while that requests are in flight."""
    before = engine.status()
    done, found = threading.Event(), {}

    def ask() -> None:
        found.update(load.run(engine, concurrency))
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while not done.is_set():
        version = publisher.next_version
        publisher.publish(version, weights)
        publisher.wait_ack(version, 30.0, engines=before["dp_size"])
    thread.join()
    status = engine.status()
    count = status["swaps"] - before["swaps"]
    milliseconds = status["swap_ms"][-count:]
    return {
        "swaps": count,
        "p50_ms": statistics.median(milliseconds),
        "max_ms": max(milliseconds),
        "texts": found["texts"],
    }


def from_disk(engine: SGLangClient, load: Load, concurrency: int, model: str, repeats: int) -> dict:
    """SGLang's own reload of the target, on the plain server under the same load: how long its answer takes.

    Without its flush of the cache, which it does by default: with requests in flight that ends the server.
    """
    taken, done = [], threading.Event()

    def ask() -> None:
        load.run(engine, concurrency)
        done.set()

    thread = threading.Thread(target=ask)
    thread.start()
    while not done.is_set() and len(taken) < repeats:
        began = time.perf_counter()
        engine.post("/update_weights_from_disk", {"model_path": model, "flush_cache": False}, 120.0)
        taken.append((time.perf_counter() - began) * 1e3)
    thread.join()
    return {"p50_ms": statistics.median(taken), "max_ms": max(taken)}


def stale(engine: SGLangClient, publisher: WeightPublisher, load: Load, weights: dict) -> dict:
    """Acceptance where the drafter's cache of every prompt was made by the weights that the server started with.

    Requests that run all the while keep the prefix cache from being emptied; without them the cache is made anew.
    """
    load.run(engine, 1)  # the prompts are in the prefix cache now
    done = threading.Event()
    with ThreadPoolExecutor(3) as keepers:
        for number in range(3):
            keepers.submit(load.keep_busy, engine, number, done)
        time.sleep(1.0)
        version = publisher.next_version
        publisher.publish(version, weights)
        assert publisher.wait_ack(version, 30.0, engines=engine.status()["dp_size"])
        old = load.run(engine, 1)["acceptance_length"]
        done.set()
    time.sleep(1.0)
    fresh = load.run(engine, 1)["acceptance_length"]
    return {"acceptance_length_old_prompt_cache": old, "acceptance_length_fresh": fresh}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="folder or hub id of the target")
    parser.add_argument("--drafter", required=True, help="folder of an EAGLE-3 drafter for it")
    parser.add_argument("--concurrency", default="1,4,16", help="requests in flight")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--tp-size", type=int, default=1, help="GPUs that hold the model together")
    parser.add_argument("--dp-size", type=int, default=1, help="replicas of it, each with a drafter of its own")
    parser.add_argument("--repeats", type=int, default=2, help="turns with recording and without")
    parser.add_argument(
        "--older", help="an earlier drafter: measures what its rows in the prefix cache cost a later one"
    )
    options = parse(parser)
    figures = measure(options)
    write_result(__file__, options, figures)


def measure(options: argparse.Namespace) -> dict:
    dtype = default_dtype(options.device)
    model, tokenizer = load_target(options.model, dtype=dtype, device="cpu")
    parts = TargetParts.of(model)
    drafter = load_drafter(options.drafter, parts)
    handshake, weights = Handshake.of(parts, drafter, "eagle3"), drafter.to(dtype).published()
    stop = stop_token_ids(model, tokenizer)
    tokens = [encode_chat(tokenizer, prompt.messages) for prompt in prompts(options)]
    load = Load(tokens, options.max_new_tokens, stop)
    levels = [int(level) for level in options.concurrency.split(",")]
    folder = str(embedded_model_path()) if options.model == "smollm2" else options.model
    launched = {
        "num_slots": max(levels),
        "max_length": max(map(len, tokens)) + options.max_new_tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "device": options.device,
        "environment": {"OMP_NUM_THREADS": str(options.threads)},
        "arguments": ["--tp-size", str(options.tp_size), "--dp-size", str(options.dp_size)],
    }
    figures: dict = {"drafter": {"depth": options.depth, "width": options.width, "nodes": options.nodes}, "slots": {}}
    figures["ranks"] = {"tp_size": options.tp_size, "dp_size": options.dp_size}
    with ExitStack() as stack:
        collector = ZMQCollector("tcp://127.0.0.1:*", handshake=handshake)
        stack.callback(collector.shutdown)
        publisher = WeightPublisher("tcp://127.0.0.1:*", handshake=handshake)
        stack.callback(publisher.close)
        drain = threading.Thread(target=lambda: [collector.poll(0.1) for _ in iter(lambda: stopped.is_set(), True)])
        stopped = threading.Event()
        stack.callback(drain.join)
        stack.callback(stopped.set)
        drain.start()
        shape = {"depth": options.depth, "width": options.width, "num_nodes": options.nodes}
        engine = stack.enter_context(SGLangClient.launch(folder, drafter=options.drafter, **shape, **launched))
        plain = stack.enter_context(SGLangClient.launch(folder, **launched))
        engine.attach(handshake=handshake, trajectories=collector.address, weights=publisher.address)
        for level in levels:
            expected = load.run(plain, level)["texts"]  # and both have run once
            load.run(engine, level)
            on, off, control = [], [], []
            for _ in range(options.repeats):
                control.append(load.run(plain, level))
                engine.set_recording(True)
                on.append(load.run(engine, level))
                engine.set_recording(False)
                off.append(load.run(engine, level))
            engine.set_recording(True)
            swapped = swaps(engine, publisher, load, level, weights)
            figures["slots"][level] = {
                "plain_tokens_per_second": rate(control),
                "speculative_tokens_per_second": rate(on),
                "speedup": rate(on) / rate(control),
                "acceptance_length": on[-1]["acceptance_length"],
                "recording_on_over_off": rate(on) / rate(off),
                "swap": {key: swapped[key] for key in ("swaps", "p50_ms", "max_ms")},
                "update_weights_from_disk": from_disk(plain, load, level, folder, 5),
                # In bfloat16 the last bits depend on the shape of a batch, and so does a near tie.
                "texts_as_plain": sum(a == b for a, b in zip(swapped["texts"], expected, strict=True)),
                "texts": len(expected),
            }
            print(level, figures["slots"][level], flush=True)
        status = engine.detach()
        if options.older:
            older = stack.enter_context(SGLangClient.launch(folder, drafter=options.older, **shape, **launched))
            older.attach(handshake=handshake, trajectories=collector.address, weights=publisher.address)
            figures["swap_from_an_older_drafter"] = stale(older, publisher, load, weights)
            older.detach()
        figures["sglang"] = status["sglang"]
    return figures


if __name__ == "__main__":
    main()

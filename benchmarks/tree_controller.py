"""The tree controller against plain decoding: a useless drafter, an improving one, and a batch that grows and shrinks.

Windows of whole plain rounds take turns with the controller's rounds in one run, for a third of the decode time. No
weights are learned here. The useless drafter is the trained one with the rows of its draft heads permuted. The
improving one moves by swaps from an untrained to a trained checkpoint of the same draft vocabulary. With ``--lookup 8``
lookup is merged into the trees of both, and lookup alone is a choice of the controller.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import MAX_LENGTH, arguments, over_plain, parse, prompts, request_queue, usual_request, write_result
from tensordict import TensorDict
from torch import Tensor

from aurora_rl import Request, TargetParts, TreeShape
from aurora_rl.models.loading import default_dtype, load_target, stop_token_ids
from aurora_rl.policies.calibration import cost_table, measure_rounds, shape_name
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows, rates

Weights = dict[str, Tensor]


class Script:
    """Stands for a learner: brings each of its weights once so many requests are complete."""

    def __init__(self, versions: Sequence[Weights], every: int) -> None:
        self._waiting = [(every * v, v, TensorDict(w, batch_size=[])) for v, w in enumerate(versions, 1)]
        self.completed: Callable[[], int] = lambda: 0

    def latest(self) -> tuple[int, TensorDict] | None:
        if not self._waiting or self.completed() < self._waiting[0][0]:
            return None
        return self._waiting.pop(0)[1:]

    def acknowledge(self, version: int, checksum: str, swap_ms: float) -> None:
        pass


def serve(
    options: argparse.Namespace,
    folder: Path,
    first: Weights,
    *,
    adaptive: bool = True,
    later: Sequence[Weights] = (),
    parts: Sequence[tuple[str, int, int]],
) -> dict:
    """Serve the prompts in parts, each of a name, a number of requests and how many are in flight at once."""
    dtype = default_dtype(options.device)
    model, tokenizer = load_target("smollm2", dtype=dtype, device=options.device)
    drafter = load_drafter(options.trained, TargetParts.of(model))
    drafter.install(first)
    source = request_queue(options, prompts(options), model, tokenizer)
    ends = [sum(count for _, count, _ in parts[: i + 1]) for i in range(len(parts))]
    asked = 0

    def part() -> int:
        return sum(len(server.stats.finished) >= end for end in ends)

    def requests() -> Request | None:
        nonlocal asked
        here = part()
        if here == len(parts) or asked == ends[here] or asked - len(server.stats.finished) >= parts[here][2]:
            return None
        asked += 1
        return source()

    most = TreeShape(options.depth, options.width, options.nodes, lookup=options.lookup)
    decoder = SpeculativeDecoder(
        model,
        drafter,
        requests,
        shape=most,
        max_length=MAX_LENGTH,
        num_slots=max(in_flight for _, _, in_flight in parts),
        stop_tokens=stop_token_ids(model, tokenizer),
    )
    policy = decoder.policy
    tried = TreeController.candidates(most)
    costs = measure_rounds(decoder.engine, policy, usual_request(options, source), tried) if adaptive else {}
    script = Script(later, parts[0][1])
    server = InferenceServer(
        decoder.env,
        policy,
        windows=BaselineWindows(0.33, 32),
        log=MetricsLog(folder / "metrics.jsonl", "server"),
        controller=TreeController(costs) if adaptive else None,
        receiver=script,
        note=source.completed,
    )
    server.stats.rounds = []  # every round, for the parts
    script.completed = lambda: len(server.stats.finished)
    chosen: list[Counter[str]] = [Counter() for _ in parts]
    while (here := part()) < len(parts) and server.step():
        if server.stats.rounds[-1].speculative:
            shape = policy.shape
            name = shape_name(shape)  # as in the table of costs
            chosen[here][name if shape.depth else "none"] += 1
    return {
        "controller": adaptive,
        **({"round_ms_at_start": cost_table(costs)} if adaptive else {}),
        "parts": [
            {
                "part": name,
                "requests": count,
                "in_flight": in_flight,
                **figures(server, end - count, end),
                "rounds_by_shape": dict(shapes.most_common()),
            }
            for (name, count, in_flight), end, shapes in zip(parts, ends, chosen, strict=True)
        ],
        "whole": figures(server, 0, ends[-1]),
    }


def figures(server: InferenceServer, begin: int, end: int) -> dict:
    measured = rates([r for r in server.stats.rounds if begin <= r.request < end])
    return {
        "acceptance_length_where_drafted": server.stats.acceptance(begin, end),
        "tokens_per_second": {"plain": measured.baseline, "controlled": measured.speculative},
        "over_plain": over_plain(measured),
    }


def blend(start: Weights, end: Weights, share: float) -> Weights:
    return {
        name: tensor.lerp(end[name], share) if tensor.is_floating_point() else tensor for name, tensor in start.items()
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--trained", required=True, help="trained drafter, such as RUN_DIR/drafter")
    parser.add_argument("--untrained", required=True, help="what it started from, such as RUN_DIR/drafter-day0")
    parser.add_argument("--lookup", type=int, default=8, help="most nodes that are looked up for a tree; 0 for none")
    parser.add_argument("--streams", default="useless,improving,batch")
    parser.add_argument("--slots", type=int, default=2, help="of the useless and the improving drafter")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5, help="swaps from the untrained to the trained drafter")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    model, _ = load_target("smollm2", dtype=torch.float32, device="cpu")
    target = TargetParts.of(model)
    drafters = [load_drafter(folder, target).requires_grad_(False) for folder in (options.trained, options.untrained)]
    trained, untrained = (drafter.published() for drafter in drafters)
    rows = torch.randperm(len(drafters[0].draft_vocab), generator=torch.Generator().manual_seed(0))
    del model, drafters
    # Every matrix that has a row for each token of the draft vocabulary: one head, or one for every depth.
    useless = {name: t[rows] if t.ndim == 2 and len(t) == len(rows) else t for name, t in trained.items()}
    improving = [blend(untrained, trained, share) for share in torch.linspace(0, 1, options.steps).tolist()]
    each = options.limit // (options.steps + 1)
    stages = ["useless", *(f"{share:.2f} of the way" for share in torch.linspace(0, 1, options.steps).tolist())]
    few, many = options.limit // 6, options.limit - 2 * (options.limit // 6)
    streams: dict[str, Callable[[Path, bool], dict]] = {
        "useless": lambda folder, adaptive: serve(
            options, folder, useless, adaptive=adaptive, parts=[("useless", options.limit, options.slots)]
        ),
        "improving": lambda folder, adaptive: serve(
            options,
            folder,
            useless,
            adaptive=adaptive,
            later=improving,
            parts=[(stage, each, options.slots) for stage in stages],
        ),
        "batch": lambda folder, adaptive: serve(
            options,
            folder,
            trained,
            adaptive=adaptive,
            parts=[("one", few, 1), ("eight", many, 8), ("one again", few, 1)],
        ),
    }
    result = {}
    with TemporaryDirectory() as folder:
        for name in options.streams.split(","):
            # The improving drafter would have to be compared with every fixed shape.
            for adaptive in (True,) if name == "improving" else (True, False):
                cell = streams[name](Path(folder), adaptive)
                result[f"{name}, {'controller' if adaptive else 'fixed shape'}"] = cell
                print(name, cell, flush=True)
    shape = {"depth": options.depth, "width": options.width, "num_nodes": options.nodes}
    figures_of_run = {"threads": options.threads, "lookup": options.lookup, "most": shape, "streams": result}
    write_result(__file__, options, figures_of_run)


if __name__ == "__main__":
    main()

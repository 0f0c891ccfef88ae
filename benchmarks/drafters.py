"""Every architecture on the same requests, from nothing: what it learns, what a round costs, how much faster it serves.

    python benchmarks/drafters.py --prompts code.jsonl,sql.jsonl,math.jsonl --work runs/drafters

For each file of prompts (without any, for the built-in generator's) a stream is recorded once, with the features that
any of the drafters read. Each drafter learns from it in order of arrival. Its acceptance length is that of replay on
the next requests, which it has not seen. The expected speedup is this length times a plain round's time over that of a
round with drafts. At the end the trained drafter serves requests after the stream, in turns with plain decoding.
transformers' prompt lookup is timed on them too, next to its plain `generate`. Streams and
learning curves that are in --work already are reused. Serving is measured again.

--until record also says how many of the answers' tokens a draft vocabulary of the first 64 prompts holds, by its rows.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import MAX_LENGTH, arguments, over_plain, parse, request_queue, usual_request, write_result
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.models.loading import default_dtype, encode_chat, load_target, stop_token_ids
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import SumLoss, make_objectives
from aurora_rl.policies import (
    Drafter,
    NgramDrafter,
    TargetParts,
    TreeShape,
    choose_draft_vocab,
    get_drafter,
    token_prior,
)
from aurora_rl.policies.calibration import measure_rounds
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows
from aurora_rl.training.gate import replay
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_on
from aurora_rl.workload.traffic import generate_traffic, read_jsonl

# What each learns by; EAGLE's paper asks for its feature regression.
OBJECTIVES: dict[str, dict[str, Any]] = {"eagle": {"name": "imitation", "regression": 1.0}}
LOOKUP = "+lookup"  # the drafter named before it with lookup merged into its trees; it is not trained again


def learned(name: str) -> str:
    """The drafter that learns."""
    return name.removesuffix(LOOKUP)


class World:
    """The target, the drafters to compare and the prompts of a domain."""

    def __init__(self, options, domain: Path | None) -> None:
        self.options, self.name = options, domain.stem if domain else "generated"
        self.dtype = default_dtype(options.device)
        self.model, self.tokenizer = load_target("smollm2", dtype=self.dtype, device=options.device)
        self.parts = TargetParts.of(self.model)
        count = options.requests + options.live
        prompts = read_jsonl(str(domain), limit=count) if domain else generate_traffic(count)
        self.ids = [encode_chat(self.tokenizer, p.messages) for p in prompts]
        self.prompts = prompts[options.requests :]
        self.shape = TreeShape(options.depth, options.width, options.nodes)
        self.work = options.work / self.name
        self.prior = token_prior(self.model, self.ids[:64])
        self.vocab = choose_draft_vocab(options.vocab_size, self.prior)

    def drafter(self, name: str) -> Drafter:
        torch.manual_seed(0)
        return get_drafter(name).from_target(self.parts, draft_vocab=self.vocab)

    def trained(self, name: str) -> Drafter:
        """What the stream has made of it."""
        folder = self.work / learned(name) / "drafter"
        return load_drafter(folder, self.parts) if folder.exists() else self.drafter(learned(name))

    def shape_of(self, name: str) -> TreeShape:
        """The trees that it is served with."""
        return replace(self.shape, lookup=8) if name.endswith(LOOKUP) else self.shape

    def stream(self, layers: Sequence[int]) -> TrajectoryDataset:
        """The recorded requests, with the features of the layers side by side."""
        recording, every = TrajectoryDataset(self.work / "stream"), NgramDrafter(len(self.parts.head))
        every.feature_layers = tuple(layers)
        requests = [
            Request(i, torch.tensor(ids), SamplingParams(max_tokens=self.options.max_new_tokens))
            for i, ids in enumerate(self.ids[: self.options.requests])
        ]
        record_requests(
            self.model,
            every,
            requests,
            recording,
            shape=TreeShape(2),
            stop_tokens=stop_token_ids(self.model, self.tokenizer),
        )
        return recording


def held(stream: Sequence[TensorDict], prior: Tensor) -> dict[int, float]:
    """Share of the answers' tokens that a draft vocabulary by a prior holds, by its rows."""
    answers = torch.cat([each["sequence", "tokens"][int(each["sequence", "prompt_length"]) :] for each in stream])
    return {
        rows: round(torch.isin(answers, choose_draft_vocab(rows, prior)).double().mean().item(), 4)
        for rows in (2048, 4096, 8192, 16384)
    }


def of_layers(stream: Sequence[TensorDict], recorded: Sequence[int], wanted: Sequence[int]) -> list[TensorDict]:
    """Trajectories with the features of some of the recorded layers only."""
    out = []
    for trajectory in stream:
        features: Tensor = trajectory["sequence", "features"]
        parts = features.chunk(len(recorded), dim=-1)
        kept = [features[:, :0], *(parts[list(recorded).index(layer)] for layer in wanted)]
        out.append(trajectory.clone(recurse=False).set(("sequence", "features"), torch.cat(kept, dim=-1)))
    return out


def learn(world: World, names: Sequence[str], stream: list[TensorDict]) -> None:
    """The acceptance length on the next requests, after every so many learned from; kept with the drafter."""
    name = learned(names[0])
    every, folder = world.options.every, world.work / name
    drafter = world.drafter(name)
    served = drafter.serving_copy(world.dtype)
    curves: dict[str, list[tuple[int, float]]] = {each: [] for each in names}

    def evaluate(seen: int) -> None:
        ahead = stream[seen : seen + every]
        if drafter.formats:
            served.install(drafter.published())
        for each, curve in curves.items():
            curve.append((seen, replay(served, ahead, world.shape_of(each)).acceptance_length))
            print(f"{world.name} {each}: {seen} requests, acceptance length {curve[-1][1]:.3f}", flush=True)

    began = time.perf_counter()
    evaluate(0)
    if drafter.formats:
        head = TargetHead.like(world.parts.head).float()
        loss = SumLoss(make_objectives([OBJECTIVES.get(name, {"name": "imitation"})], drafter, head))
        optimizers = drafter_optimizers(drafter)
        steps = train_on(
            stream[:-every], loss, optimizers, replay=world.options.replay, autocast=world.dtype == torch.bfloat16
        )
        for seen, _, _ in steps:
            if seen % every == 0:
                evaluate(seen)
        save_drafter(drafter, folder / "drafter")
    else:
        for seen in range(every, len(stream) - every + 1, every):
            evaluate(seen)
    folder.mkdir(parents=True, exist_ok=True)
    parameters = sum(p.numel() for p in drafter.parameters())
    result = {"parameters": parameters, "seconds": round(time.perf_counter() - began, 1), "curves": curves}
    (folder / "curve.json").write_text(json.dumps(result))


def serve(world: World, name: str) -> dict[str, Any]:
    """Requests that come after the stream, speculative and plain in turns."""
    options, shape = world.options, world.shape_of(name)
    model, _ = load_target("smollm2", dtype=world.dtype, device=options.device)
    requests = request_queue(options, world.prompts, model, world.tokenizer)
    decoder = SpeculativeDecoder(
        model,
        world.trained(name),
        requests,
        shape=shape,
        max_length=MAX_LENGTH,
        stop_tokens=stop_token_ids(model, world.tokenizer),
    )
    policy = decoder.policy
    none = replace(shape, depth=0)
    costs = measure_rounds(decoder.engine, policy, usual_request(options, requests), [none, shape])[1]
    drafting: list[float] = []
    draft = policy.draft

    def timed(*arguments: Any) -> TensorDict:
        began = time.perf_counter()
        out = draft(*arguments)
        if policy.speculate:
            drafting.append(time.perf_counter() - began)
        return out

    policy.draft = timed
    with TemporaryDirectory() as folder:
        server = InferenceServer(
            decoder.env,
            policy,
            windows=BaselineWindows(0.4, 16),
            log=MetricsLog(Path(folder) / "metrics.jsonl", "server"),
            note=requests.completed,
        )
        while server.step():
            pass
    return {
        "draft_ms": 1e3 * statistics.median(drafting),
        "round_ms": 1e3 * costs[shape],
        "plain_ms": 1e3 * costs[none],
        "acceptance_length": server.stats.acceptance(0, len(server.stats.finished)),
        "speedup": over_plain(server.stats.rates()),
    }


def prompt_lookup(world: World) -> float:
    """Transformers' own prompt lookup, as a multiple of its plain `generate`, on the same requests."""
    ratios = []
    for prompt in world.ids[world.options.requests :]:
        ids = torch.tensor([prompt], device=world.options.device)
        rates = []
        for extra in ({"prompt_lookup_num_tokens": 8}, {}):
            began = time.perf_counter()
            out = world.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=world.options.max_new_tokens,
                **extra,
            )
            rates.append((out.shape[1] - ids.shape[1]) / (time.perf_counter() - began))
        ratios.append(rates[0] / rates[1])
    return statistics.median(ratios)


def plot(domains: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(domains), 7), layout="tight")
    axes = figure.subplots(2, len(domains), sharex=True, sharey="row", squeeze=False)
    for (above, below), (domain, cells) in zip(axes.T, domains.items(), strict=True):
        for number, (name, cell) in enumerate(cells["drafters"].items()):
            above.plot(*zip(*cell["curve"], strict=True), label=name, color=f"C{number}")
            below.plot(*zip(*cell["expected_speedup"], strict=True), color=f"C{number}")
            below.plot(cell["expected_speedup"][-1][0], cell["speedup"], "o", color=f"C{number}")
        above.set_title(domain)
        below.set_xlabel("requests learned from")
    axes[0][0].set_ylabel("acceptance length on the next requests")
    axes[1][0].set_ylabel("speedup: expected, and served (dots)")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--drafters", default="eagle3,eagle,medusa,standalone,dflash,ngram,eagle3+lookup,medusa+lookup")
    parser.add_argument("--work", type=Path, default=Path("runs/drafters"))
    parser.add_argument("--requests", type=int, default=128, help="of each stream")
    parser.add_argument("--every", type=int, default=32, help="requests between two evaluations")
    parser.add_argument("--live", type=int, default=8, help="requests after the stream that are served")
    parser.add_argument("--replay", type=int, default=4, help="replayed batches for each new one")
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--width", type=int, default=4)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--until", choices=["record", "learn", "serve"], default="serve", help="stop after a part")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    names, domains = options.drafters.split(","), {}
    for path in [Path(name) for name in options.prompts.split(",")] if options.prompts else [None]:
        world = World(options, path)
        untrained = {name: world.drafter(name) for name in map(learned, names)}
        layers = sorted({layer for drafter in untrained.values() for layer in drafter.feature_layers})
        asked = world.work / "layers.json"
        world.work.mkdir(parents=True, exist_ok=True)
        if not asked.exists():
            asked.write_text(json.dumps(layers))
        recorded = json.loads(asked.read_text())
        stream = world.stream(recorded)
        if options.until == "record":
            print(f"{world.name}: share of the tokens by rows: {held(list(stream), world.prior)}", flush=True)
            continue
        for name, drafter in untrained.items():
            if not (world.work / name / "curve.json").exists():
                same = [each for each in names if learned(each) == name]
                learn(world, same, of_layers(list(stream), recorded, drafter.feature_layers))
        if options.until == "learn":
            continue
        cells: dict[str, Any] = {}
        for name in names:
            kept = json.loads((world.work / learned(name) / "curve.json").read_text())
            curve, served = kept["curves"][name], serve(world, name)
            gain = served["plain_ms"] / served["round_ms"]
            expected = [(seen, acceptance * gain) for seen, acceptance in curve]
            cells[name] = {"parameters": kept["parameters"], "curve": curve, "expected_speedup": expected, **served}
            print(world.name, name, served, flush=True)
        domains[world.name] = {"drafters": cells, "transformers_prompt_lookup_speedup": prompt_lookup(load(world))}
    if options.until != "serve":
        return
    write_result(__file__, options, {"threads": options.threads, "slots": 1, "domains": domains})
    plot(domains, options.out / "drafters.png")


def load(world: World) -> World:
    """The world with a target that no engine has changed."""
    world.model, _ = load_target("smollm2", dtype=world.dtype, device=world.options.device)
    return world


if __name__ == "__main__":
    main()

"""The tree controller against fixed shapes, on recorded requests and a clock that a table of measured costs turns.

Nothing is computed by the target: what it said is on record, so that each way has exactly the drafts accepted that it
would have had, and the same on every machine. The recording is that of `aurora-rl bench adaptation`, and so is the
drafter. A round takes `BASE + SLOT * slots + ROW * rows`, at least `LEAST`, and drafting takes time next to it; the
constants fit what `aurora-rl` measured of SmolLM2 in bfloat16 on one core (docs/results.md, tree control).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from common import arguments, parse, write_result
from tensordict import TensorDictBase
from torch import Tensor

from aurora_kernels.trees import depths
from aurora_rl import Request, SamplingParams, SpecDecodeEnv, TargetParts, TreeShape
from aurora_rl.adaptation.recorded_stream import RecordedPhase
from aurora_rl.context import ContextStore
from aurora_rl.envs.engine import Engine
from aurora_rl.models.loading import load_target
from aurora_rl.policies import Drafter, DrafterPolicy
from aurora_rl.policies.formats.files import load_drafter
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving import server as server_module
from aurora_rl.serving.server import InferenceServer
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows

# Milliseconds: of a pass, of a slot and of a row in it; of a drafter's call, and of each depth, alone and a slot.
BASE, LEAST, SLOT, ROW = 31.0, 37.5, 0.8, 1.57
CALL, DEPTH, DEPTH_SLOT = 2.0, 0.9, 0.09
LOOKUP_SLOT = 0.15
MOST = TreeShape(4, 4, 4, lookup=8)


class Clock:
    """Stands for the module `time` where rounds are timed."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


def seconds(drafts: bool, looks_up: bool, depth: int, slots: int, nodes: int) -> float:
    took = max(LEAST, BASE + SLOT * slots + ROW * (slots + nodes))
    took += (CALL + depth * (DEPTH + DEPTH_SLOT * slots)) * drafts + LOOKUP_SLOT * slots * looks_up
    return took / 1e3


def costs(most: int) -> dict[int, dict[TreeShape, float]]:
    """Return what the controller would have measured at start."""
    return {
        slots: {
            shape: seconds(
                shape.depth > 0 and not shape.lookup_only, shape.lookup > 0 and shape.depth > 0,
                shape.depth, slots, slots * shape.num_nodes,
            )
            for shape in TreeController.candidates(MOST)
        }
        for slots in sorted({*(2**i for i in range(most.bit_length())), most})
    }  # fmt: skip


class RecordedEngine(Engine):
    """Says what the target said, and turns the clock by what a round would have taken."""

    def __init__(self, recorded: Sequence[TensorDictBase], slots: int, vocab_size: int, clock: Clock) -> None:
        self._by_prompt = {tuple(prompt_of(each).tolist()): each["sequence"] for each in recorded}
        width = recorded[0]["sequence", "features"].shape[-1]
        longest = max(len(each["sequence", "tokens"]) for each in recorded)
        # A hidden state is the token that comes next.
        self.store = ContextStore(slots, longest + 2, width, 1, torch.float32, torch.device("cpu"))
        self.vocab_size, self.prefill_seconds, self._clock = vocab_size, 0.0, clock
        self._texts: dict[int, TensorDictBase] = {}
        self.rounds = self.nodes = 0
        self.policy: DrafterPolicy

    def prefill(self, slots: Sequence[int], prompts: Sequence[Tensor]) -> None:
        for slot, prompt in zip(slots, prompts, strict=True):
            self._texts[slot] = text = self._by_prompt[tuple(prompt.tolist())]
            self.store.features[slot, : len(prompt) - 1] = text["features"][: len(prompt) - 1].float()
            self.store.start(slot, prompt)

    def verify(self, slots: Tensor, tokens: Tensor, parents: Tensor, valid: Tensor) -> Tensor:
        depth = torch.cat([torch.zeros(len(slots), 1, dtype=torch.int64), depths(parents)], 1)
        at = (self.store.lengths[slots][:, None] + depth).tolist()
        texts = [self._texts[slot]["tokens"] for slot in slots.tolist()]
        self._hidden = torch.stack(
            [text[torch.tensor(places).clamp(max=len(text) - 1)] for text, places in zip(texts, at, strict=True)]
        ).float()[..., None]
        policy, nodes = self.policy, int(valid.sum())
        drafted, looked_up = bool(policy.drafted.any()), policy.shape.lookup > 0 and policy.speculate
        self._clock.now += seconds(drafted, looked_up, policy.shape.depth, len(slots), nodes)
        self.rounds, self.nodes = self.rounds + 1, self.nodes + nodes
        return self._hidden

    def logits(self, hidden: Tensor) -> Tensor:
        return F.one_hot(hidden[..., 0].long(), self.vocab_size).float()

    def commit(self, slots: Tensor, path: Tensor, tokens: Tensor, num_new: Tensor) -> Tensor:
        features = torch.zeros(*tokens.shape, self.store.features.shape[-1])
        for row, slot in enumerate(slots.tolist()):
            start = int(self.store.lengths[slot]) - 1
            found = self._texts[slot]["features"][start : start + tokens.shape[1]].float()
            features[row, : len(found)] = found
        self.store.append(slots, tokens, num_new, features, torch.zeros(*tokens.shape, 1))
        return features

    def release(self, slot: int) -> None:
        self.store.release(slot)


def prompt_of(recorded: TensorDictBase) -> Tensor:
    return recorded["sequence", "tokens"][: int(recorded["sequence", "prompt_length"])]


def answer_of(recorded: TensorDictBase) -> Tensor:
    return recorded["sequence", "tokens"][int(recorded["sequence", "prompt_length"]) :]


def ways(slots: int) -> dict[str, TreeShape | TreeController]:
    """Return the controller and the shapes that it is compared with."""
    return {
        "plain": TreeShape(0),
        **{f"lookup {nodes}": MOST.without_drafter(nodes) for nodes in (1, 2, 4, 8)},
        **{f"tree {depth}": TreeShape(depth, 4, 4, lookup=8) for depth in (1, 2, 4)},
        "controller": TreeController(costs(slots)),
    }


def measure(
    way: TreeShape | TreeController,
    drafter: Drafter,
    recorded: Sequence[TensorDictBase],
    before: Sequence[TensorDictBase],
    slots: int,
) -> dict[str, Any]:
    """Serve the requests one way; lookup knows the answers of those before from the start."""
    clock = Clock()
    engine = RecordedEngine(recorded, slots, drafter.vocab_size, clock)
    served, fixed = drafter.serving_copy(torch.float32, torch.device("cpu")), isinstance(way, TreeShape)
    # Not a SpeculativeDecoder, which needs a target model: this engine plays a recording back.
    policy = engine.policy = DrafterPolicy(
        served, engine.store, num_nodes=MOST.max_nodes, shape=way if isinstance(way, TreeShape) else MOST
    )
    policy.earlier = earlier = EarlierAnswers(1 << 16)
    for each in before:
        earlier.add(answer_of(each).numpy())
    requests = [
        Request(number, prompt_of(each), SamplingParams(max_tokens=len(answer_of(each))))
        for number, each in enumerate(recorded)
    ]
    requests.reverse()
    env = SpecDecodeEnv(engine, lambda: requests.pop() if requests else None, num_nodes=MOST.max_nodes)
    drafted: Counter[str] = Counter()
    with TemporaryDirectory() as folder, patch.object(server_module, "time", clock):
        server = InferenceServer(
            env, policy, windows=BaselineWindows(0.0, 1), log=MetricsLog(Path(folder, "metrics.jsonl"), "server"),
            controller=None if fixed else way, note=lambda completion: earlier.add(completion.tokens.numpy()) or "",
        )  # fmt: skip
        while server.step():
            shape = policy.shape
            drafted["lookup" if shape.lookup_only else f"tree {shape.depth}" if shape.depth else "plain"] += 1
        server.close()
    tokens = sum(len(answer_of(each)) for each in recorded)
    return {
        "tokens_per_second": round(tokens / clock.now, 2),
        "nodes_a_round_and_slot": round(engine.nodes / engine.rounds / slots, 2),
        "rounds": dict(drafted.most_common()),
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run of `aurora-rl bench adaptation`")
    parser.add_argument("--phases", default="0", help="numbers of the phases whose requests are served")
    parser.add_argument("--slots", default="1,2,4,8")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    parts = TargetParts.of(load_target("smollm2", dtype=torch.bfloat16, device="cpu")[0])
    drafter = load_drafter(next((options.run / "trained").iterdir()), parts)
    layers, figures = list(drafter.feature_layers), {}
    for phase in options.phases.split(","):
        stream = RecordedPhase(options.run / "stream" / f"phase-{phase}", layers, layers)
        before = [stream[number] for number in range(options.skip)]
        recorded = [stream[number] for number in range(options.skip, min(options.skip + options.limit, len(stream)))]
        for slots in map(int, options.slots.split(",")):
            found = {}
            for name, way in ways(slots).items():
                found[name] = measure(way, drafter, recorded, before, slots)
                found[name]["over_plain"] = round(
                    found[name]["tokens_per_second"] / found["plain"]["tokens_per_second"], 3
                )
                print(f"phase {phase}, {slots} slots, {name}: {found[name]}", flush=True)
            best = max((each["tokens_per_second"], name) for name, each in found.items() if name != "controller")
            found["controller"]["over_best_fixed"] = round(found["controller"]["tokens_per_second"] / best[0], 3)
            found["controller"]["best_fixed"] = best[1]
            figures[f"phase {phase}, {slots} slots"] = found
    names = ("BASE", "LEAST", "SLOT", "ROW", "CALL", "DEPTH", "DEPTH_SLOT", "LOOKUP_SLOT")
    constants = {name.lower(): globals()[name] for name in names}
    write_result(__file__, options, {"milliseconds": constants, "tokens_per_second": figures})


if __name__ == "__main__":
    main()

"""What `tests/training/test_parallel.py` runs as ranks of a learner: `shared_steps.py SCENARIO FOLDER`.

Rank 0 writes what it found to `FOLDER/found.json`.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributed.tensor import DTensor

from aurora_rl import SamplingParams
from aurora_rl.objectives import SumLoss, make_objectives
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.policies.adapters import add_adapters
from aurora_rl.testing import serve, tiny_target
from aurora_rl.training.checkpoint import load_training_state, save_training_state, training_tensors
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.parallel import ParallelLoss, RankCommand, Ranks, RanksLostError, follow, join, start_alike
from aurora_rl.training.sharding import shard
from aurora_rl.training.steps import forget_gradient, gradient, has_finite_step, train_step
from aurora_rl.trajectories import adapter_code, pack

# Small weights: the gradient's norm is below 1, so that it is not clipped and its size is compared, too.
SMALL = 1e-3
OBJECTIVES: dict[str, list[dict[str, Any]]] = {
    "imitation": [{"name": "imitation"}],
    "imitation-served": [{"name": "imitation", "target": "served", "weighting": "expected_length", "regression": 0.1}],
    "discard": [{"name": "discard", "weighting": "reach"}],
    "expected-length": [{"name": "expected_length"}],
    "expected-length-trees": [{"name": "expected_length", "contexts": "trees"}],
    "acceptance-reward": [{"name": "acceptance_reward", "max_staleness": 1}],
    "acceptance-reward-siblings": [{"name": "acceptance_reward", "baseline": "leave_one_out", "clip": 0.2}],
    "function": [{"name": "shared_steps:forward_kl_function"}],
    "sum": [{"name": "imitation"}, {"name": "discard"}, {"name": "imitation", "divergence": "total_variation"}],
}
TENANTS = ("acme", "globex")  # of the first requests; the others have no adapter
LENGTHS, VERSIONS = (3, 19, 1, 9, 5), (0, 2, 5, 4, 3)  # of prompts: shares are uneven; and of drafters


def forward_kl_function(log_p: Tensor, log_q: Tensor, windows: Any) -> tuple[Tensor, Tensor]:
    return (log_p.exp() * (log_p - log_q)).sum(-1), windows.valid


TARGET = tiny_target()
PARTS = TargetParts.of(TARGET)


def drafter_of(seed: int, adapters: bool = False) -> Drafter:
    torch.manual_seed(seed)
    drafter = Eagle3Drafter.from_target(PARTS, draft_vocab=torch.arange(16)).double()
    if adapters:
        add_adapters(drafter, TENANTS, rank=2)
    with torch.no_grad():  # parts that start at zero would hide what they do
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return drafter


@cache
def _served(depth: int) -> list[TensorDict]:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(32, (length,), generator=generator) for length in LENGTHS]
    shape = TreeShape(depth, 2, mode="sampled") if depth else TreeShape(0)
    sampled = SamplingParams(temperature=1.0, seed=0)
    return serve(
        drafter_of(0), TARGET, prompts, shape=shape, max_new_tokens=6, num_slots=len(prompts), sampling_params=sampled
    )


def stream(depth: int = 3) -> list[TensorDict]:
    """Trajectories of several lengths, drafted by several versions; with depth 0 there is nothing of drafts in them."""
    found = sorted((each.clone() for each in _served(depth)), key=lambda each: int(each["request"]))
    for trajectory, version in zip(found, VERSIONS, strict=True):
        trajectory["rounds", "policy_version"].fill_(version)
    for trajectory, tenant in zip(found, TENANTS, strict=False):
        trajectory["sequence", "adapter"] = torch.tensor(adapter_code(tenant))
    return found


def losses_of(settings: list[dict[str, Any]], seed: int = 1, adapters: bool = False) -> tuple[Drafter, SumLoss]:
    drafter = drafter_of(seed, adapters)
    weighted = [{**each, "weight": SMALL} for each in settings]
    return drafter, SumLoss(make_objectives(weighted, drafter, PARTS.head))


def adam(drafter: Drafter) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(drafter.parameters(), lr=1e-3, weight_decay=0.0)]


def gradients(drafter: Drafter) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in drafter.named_parameters()}


def apart(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> float:
    """The largest difference, as a share of the largest value; infinite if one of two has a tensor alone."""
    if any((found[name] is None) != (value is None) for name, value in expected.items()):
        return float("inf")
    pairs = [(found[name], value) for name, value in expected.items() if value is not None]
    largest = max(float(value.detach().abs().max()) for _, value in pairs)
    return max(float((a - b).detach().abs().max()) for a, b in pairs) / max(largest, 1e-300)  # type: ignore[operator]


def compared(
    ranks: Ranks,
    settings: list[dict[str, Any]],
    batches: list[TensorDict],
    optimizers_of: Callable[[Drafter], Any],
    adapters: bool = False,
) -> dict[str, Any] | None:
    """Take steps together, and on rank 0 by itself, and compare."""
    drafter, loss = losses_of(settings, adapters=adapters)
    optimizers = optimizers_of(drafter)
    shared = ParallelLoss(loss, ranks, optimizers)
    start_alike(shared, optimizers)
    if ranks.rank:
        follow(shared, optimizers, autocast=False)
        weights = torch.cat([p.detach().flatten() for p in drafter.parameters()])
        ranks.gather(weights)
        return None
    own, own_loss = losses_of(settings, adapters=adapters)
    own_optimizers = optimizers_of(own)
    found: dict[str, Any] = {"norm": 0.0}
    value, out = gradient(shared, optimizers, batches[0], autocast=False)
    own_value, own_out = gradient(own_loss, own_optimizers, batches[0], autocast=False)
    found["gradient"] = apart(gradients(drafter), gradients(own))
    found["norm"] = sum(float(p.grad.square().sum()) for p in own.parameters() if p.grad is not None) ** 0.5
    found["value"] = abs(value / own_value - 1) if own_value else abs(value)
    found["metrics"] = max(
        [float((out[k] - v).detach().abs().max()) for k, v in own_out.items() if not k.startswith("loss_")]
    )
    forget_gradient(optimizers)
    forget_gradient(own_optimizers)
    for batch in batches[1:]:
        train_step(shared, optimizers, batch, autocast=False)
        train_step(own_loss, own_optimizers, batch, autocast=False)
    ranks.tell(RankCommand.END)
    weights = torch.cat([p.detach().flatten() for p in drafter.parameters()])
    of_ranks, alone = ranks.gather(weights), torch.cat([p.detach().flatten() for p in own.parameters()])
    found["weights"] = float((weights - alone).abs().max())
    found["alike"] = bool((of_ranks == weights).all())
    return found


@cache
def batches() -> list[TensorDict]:
    """Batches of five, of three and of two requests, where one rank has no drafts; and of two without any."""
    recorded, plain = stream(), stream(depth=0)
    return [pack(recorded), pack(recorded[:3]), pack([plain[1], recorded[0]]), pack([plain[4], plain[1]])]


def every_objective(ranks: Ranks, folder: Path) -> dict[str, Any] | None:
    five, three, two, plain = batches()
    found = {name: compared(ranks, settings, [five, two], adam) for name, settings in OBJECTIVES.items()}
    # The two of the second batch are one tenant's each: no rank has rows of both adapters.
    found["adapters"] = compared(ranks, OBJECTIVES["imitation"], [five, pack(stream()[:2])], adam, adapters=True)
    found["muon"] = compared(ranks, OBJECTIVES["sum"], [five, three, plain], drafter_optimizers)
    return found


def whole(drafter: Drafter) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in drafter.state_dict().items()}


def sharded(ranks: Ranks, folder: Path) -> dict[str, Any] | None:
    """Steps on shards from a state of one process, and a state of them that one process goes on with."""
    steps, found = batches()[1:3], dict[str, Any]()
    for name, optimizers_of in (("adam", adam), ("muon", drafter_optimizers)):
        adapters = name == "adam"
        own, own_loss = losses_of(OBJECTIVES["sum"], adapters=adapters)
        own_optimizers = optimizers_of(own)
        train_step(own_loss, own_optimizers, steps[0], autocast=False)
        drafter, loss = losses_of(OBJECTIVES["sum"], 1 + ranks.rank, adapters)
        optimizers = optimizers_of(drafter)
        if ranks.rank == 0:
            save_training_state(folder / f"{name}-one", own, own_optimizers, {})
            load_training_state(folder / f"{name}-one", drafter, optimizers)
        shared = ParallelLoss(loss, ranks, optimizers)
        start_alike(shared, optimizers)
        shard(shared, drafter, optimizers)
        held = sum(p.to_local().numel() for p in drafter.parameters() if isinstance(p, DTensor))
        if ranks.rank:
            follow(shared, optimizers, autocast=False)
            ranks.gather(torch.tensor(held))
            continue
        value, out = train_step(shared, optimizers, steps[1], autocast=False)
        own_value, own_out = train_step(own_loss, own_optimizers, steps[1], autocast=False)
        first = apart(whole(drafter), whole(own))
        for batch in steps:
            train_step(shared, optimizers, batch, autocast=False)
            train_step(own_loss, own_optimizers, batch, autocast=False)
        served = drafter.serving_copy(torch.float32)
        served.install(drafter.published())
        save_training_state(folder / f"{name}-two", drafter, optimizers, {})
        kept = whole(drafter)
        ranks.tell(RankCommand.END)
        again, _ = losses_of(OBJECTIVES["sum"], 7, adapters)
        again_optimizers = optimizers_of(again)
        load_training_state(folder / f"{name}-two", again, again_optimizers)
        found[name] = {
            "value": abs(value / own_value - 1),
            "metrics": max(float((out[k] - v).detach().abs().max()) for k, v in own_out.items()),
            "first": first,
            "weights": apart(kept, whole(own)),
            "restored": apart(training_tensors(again, again_optimizers), training_tensors(own, own_optimizers)),
            "served": apart({name: value.double() for name, value in whole(served).items()}, kept),
            "held": ranks.gather(torch.tensor(held)).tolist(),
            "parameters": sum(p.numel() for p in own.parameters()),
        }
    return found or None


def spoiled() -> TensorDict:
    """A batch of which the longest request, which goes to rank 0, is sound, and another has a feature that is NaN."""
    recorded = stream()
    recorded[1]["sequence", "features"][0] = torch.nan
    return pack(recorded[:2])


def not_finite(ranks: Ranks, folder: Path) -> dict[str, Any] | None:
    drafter, loss = losses_of(OBJECTIVES["imitation"])
    optimizers = adam(drafter)
    shared = ParallelLoss(loss, ranks, optimizers)
    before = copy.deepcopy(drafter.state_dict())
    if ranks.rank:
        follow(shared, optimizers, autocast=False)
        ranks.gather(torch.tensor(all(torch.equal(before[k], v) for k, v in drafter.state_dict().items())).long())
        return None
    found: dict[str, Any] = {}
    for part, batch in zip(("theirs", "ours"), (spoiled(), pack([stream()[1], spoiled_alone()])), strict=True):
        try:
            train_step(shared, optimizers, batch, autocast=False)
        except FloatingPointError as error:
            found[part] = str(error)
    # Of one request, as a learner asks when it looks for the one that spoils a step: all ranks compute it.
    found["alone"] = [
        has_finite_step(shared, optimizers, pack([each]), autocast=False) for each in (stream()[0], spoiled_alone())
    ]
    ranks.tell(RankCommand.END)
    same = all(torch.equal(before[k], v) for k, v in drafter.state_dict().items())
    found["kept"] = ranks.gather(torch.tensor(same).long()).tolist()
    return found


def spoiled_alone() -> TensorDict:
    (trajectory,) = stream()[:1]
    trajectory["sequence", "features"][0] = torch.nan
    return trajectory


def states(ranks: Ranks, folder: Path) -> dict[str, Any] | None:
    """A state of one process goes on with two, and theirs with one, as if one had taken all the steps."""
    steps = batches()[1:2]
    drafter, loss = losses_of(OBJECTIVES["acceptance-reward"], seed=1 + ranks.rank)
    optimizers = adam(drafter)
    if ranks.rank == 0:
        own, own_loss = losses_of(OBJECTIVES["acceptance-reward"])
        own_optimizers = adam(own)
        for batch in steps:
            train_step(own_loss, own_optimizers, batch, autocast=False)
        save_training_state(folder / "one", own, own_optimizers, {})
        load_training_state(folder / "one", drafter, optimizers)
        loss.objectives[0].newest.copy_(own_loss.objectives[0].newest)
    shared = ParallelLoss(loss, ranks, optimizers)
    start_alike(shared, optimizers)
    newest = ranks.gather(loss.objectives[0].newest).tolist()
    if ranks.rank:
        follow(shared, optimizers, autocast=False)
        return None
    for batch in steps:
        train_step(shared, optimizers, batch, autocast=False)
    ranks.tell(RankCommand.END)
    save_training_state(folder / "two", drafter, optimizers, {})
    again, again_loss = losses_of(OBJECTIVES["acceptance-reward"], seed=7)
    again_optimizers = adam(again)
    load_training_state(folder / "two", again, again_optimizers)
    again_loss.objectives[0].newest.copy_(loss.objectives[0].newest)
    for batch in steps:
        train_step(again_loss, again_optimizers, batch, autocast=False)
    for batch in steps * 2:
        train_step(own_loss, own_optimizers, batch, autocast=False)
    return {"newest": newest, "weights": apart(dict(again.named_parameters()), dict(own.named_parameters()))}


def unlike(ranks: Ranks, folder: Path) -> dict[str, Any] | None:
    """What each rank is told when rank 1 differs in a single thing."""

    def refusal(objective: str = "imitation", vocab: int = 0, lr: float = 1e-3, **settings: Any) -> list[str]:
        drafter, loss = losses_of(OBJECTIVES[objective])
        drafter.draft_vocab = drafter.draft_vocab + vocab
        optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(drafter.parameters(), lr=lr)]
        told = ""
        try:
            start_alike(ParallelLoss(loss, ranks, optimizers), optimizers, settings)
        except ValueError as error:
            told = str(error)
        texts = ranks.gather(torch.tensor(list(told.encode().ljust(1000)), dtype=torch.uint8))
        return [bytes(text.tolist()).decode().rstrip() for text in texts]

    differs = ranks.rank == 1
    return {
        "vocab": refusal(vocab=ranks.rank),
        "lr": refusal(lr=1e-2 if differs else 1e-3),
        "objectives": refusal("sum" if differs else "imitation"),
        "settings": refusal(**{"dtype": "bfloat16" if differs else "float32", "learner.parallel": "ddp"}),
        "absent": refusal(**({"drafter.options": {}} if differs else {})),
        "alike": refusal(**{"objectives": [dict(sorted({"name": "a", "weight": 1.0}.items(), reverse=differs))]}),
    }


def lost(ranks: Ranks, folder: Path, victim: int) -> dict[str, Any]:
    """Rank `victim` is killed in its second step. What the other one gets is in its output."""
    drafter, loss = losses_of(OBJECTIVES["imitation"])
    optimizers = adam(drafter)
    shared = ParallelLoss(loss, ranks, optimizers)
    forward, calls = shared.loss.forward, []

    def dies(batch: TensorDict) -> TensorDict:
        calls.append(batch)
        if ranks.rank == victim and len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(batch)

    shared.loss.forward = dies  # type: ignore[method-assign]
    began = time.monotonic()
    try:
        if ranks.rank:
            follow(shared, optimizers, autocast=False)
        for batch in [batches()[0]] * 3:
            train_step(shared, optimizers, batch, autocast=False)
    except RanksLostError as error:
        print(json.dumps({"steps": len(calls), "error": str(error), "seconds": time.monotonic() - began}), flush=True)
    return {}


SCENARIOS: dict[str, Callable[[Ranks, Path], Any]] = {
    "every_objective": every_objective,
    "not_finite": not_finite,
    "states": states,
    "sharded": sharded,
    "unlike": unlike,
    "lost0": lambda ranks, folder: lost(ranks, folder, 0),
    "lost1": lambda ranks, folder: lost(ranks, folder, 1),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    joined, (_, names, where) = join(torch.device("cpu"), timeout_s=60.0), sys.argv
    for name in names.split(","):
        result = SCENARIOS[name](joined, Path(where))
        if joined.rank == 0:
            (Path(where) / f"{name}.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)  # as a command ends: what Python would take apart takes two seconds

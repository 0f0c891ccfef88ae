"""The policy gradient where the exact one is known: its cosine by number of trees, and what it does for a warm drafter.

Drafter and target are tables over three tokens (`aurora_rl.testing.enumerable_worlds`). Trees of two chains of two are
drawn from the drafter. Every estimator's mean over them is compared with the derivative of the expected number of
accepted nodes, which enumeration gives. Then each estimator alone trains a drafter that imitation has warmed up. Last,
a small model is served: an EAGLE-3 drafter learns by the policy gradient alone from the drafts of each of its versions.
It is measured on other prompts.
"""

from __future__ import annotations

import argparse

import torch
from common import write_result
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import AcceptanceRewardLoss, ImitationLoss
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.testing import serve, tiny_target
from aurora_rl.testing.enumerable_worlds import (
    DrawnTree,
    EnumerableDrafter,
    EnumerableTarget,
    chance_of,
    drawn_trees,
    exact_gradient,
    expectation,
    log_probs_of,
    outcomes_of,
    reach_of,
    table_gradient,
    tree_trajectory,
)
from aurora_rl.trajectories import pack

PARENTS = (-1, -1, 0, 1)
ESTIMATORS = {
    "expected, no baseline": ("sample_and_match", {}),
    "accept bits, no baseline": ("sample_and_match", {"reward": "recorded"}),
    "expected, leave-one-out": ("sample_and_match", {"baseline": "leave_one_out"}),
    "accept bits, leave-one-out": ("sample_and_match", {"reward": "recorded", "baseline": "leave_one_out"}),
    "group-standardised": ("sample_and_match", {"baseline": "group"}),
    "expected, no baseline, rejection": ("rejection", {}),
    "expected, leave-one-out, rejection": ("rejection", {"baseline": "leave_one_out"}),
}


def warm(target: EnumerableTarget, sharpness: float) -> EnumerableDrafter:
    """A drafter that has learned the target's distributions, but blurred."""
    return EnumerableDrafter(0, start=sharpness * target.table.log_softmax(-1))


def draw(
    drafter: EnumerableDrafter, target: EnumerableTarget, rule: str, count: int, generator: torch.Generator
) -> list[tuple[DrawnTree, list[bool], float]]:
    """Trees and outcomes of this many rounds, equal ones together with their share."""
    every = [
        (tree, accepted, chance_of(drafter, tree, False).detach() * share)
        for tree in drawn_trees(PARENTS)
        for accepted, share in outcomes_of(tree, reach_of(drafter, target, tree, rule))
    ]
    law = torch.stack([chance for _, _, chance in every]).clamp(min=0)
    times = law.multinomial(count, True, generator=generator).bincount(minlength=len(every))
    return [(tree, accepted, int(n) / count) for (tree, accepted, _), n in zip(every, times, strict=True) if n]


def estimate(
    drafter: EnumerableDrafter,
    target: EnumerableTarget,
    rounds: list[tuple[DrawnTree, list[bool], float]],
    rule: str,
    settings: dict,
) -> Tensor:
    """The estimated gradient of the expected number of accepted nodes."""
    items = [
        (
            tree_trajectory(tree, target, rule=rule, accepted=accepted, log_probs=log_probs_of(drafter, tree)),
            torch.tensor(share),
        )
        for tree, accepted, share in rounds
    ]
    loss = AcceptanceRewardLoss(drafter, target.head, reduction="none", **settings)
    return -table_gradient(drafter, expectation(items, loss))


def served(rule: str, steps: int) -> dict:
    """Accepted nodes a round on unseen prompts, expected and counted: untrained, warm, and by the policy gradient."""
    torch.manual_seed(0)
    target = tiny_target()
    parts = TargetParts.of(target)
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(len(parts.head))).double()
    losses = {
        "imitation": ImitationLoss(drafter, parts.head),
        "acceptance_reward": AcceptanceRewardLoss(drafter, parts.head),
    }

    def serve_some(seed: int, count: int) -> TensorDict:
        generator = torch.Generator().manual_seed(seed)
        prompts = [torch.randint(len(parts.head), (4,), generator=generator) for _ in range(count)]
        shape, sampling = TreeShape(3, 2, 6, mode="sampled"), SamplingParams(0.3, seed=1000 * seed)
        return pack(
            serve(
                drafter,
                target,
                prompts,
                shape=shape,
                max_new_tokens=16,
                num_slots=8,
                sampling_params=sampling,
                rule=rule,
            )
        )

    def accepted() -> dict[str, float]:
        found = losses["acceptance_reward"](serve_some(1, 64))
        return {key: round(float(found[key]), 3) for key in ("expected_accepted", "accepted")}

    stages, seed = {"untrained": accepted()}, 100
    for name, count in (("imitation", steps // 2), ("acceptance_reward", steps)):
        optimizer = torch.optim.Adam(drafter.parameters(), lr=1e-3)
        for _ in range(count):
            seed += 1
            optimizer.zero_grad()
            losses[name](serve_some(seed, 16))[f"loss_{name}"].backward()
            optimizer.step()
        stages[f"after {count} steps of {name}"] = accepted()
    print(rule, stages, flush=True)
    return {"rule": rule, **stages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--counts", default="4,16,64,256,1024")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--worlds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=32, help="rounds of a training step")
    parser.add_argument("--served-steps", type=int, default=60, help="of the policy gradient on the served model")
    parser.add_argument("--name")
    options = parser.parse_args()
    generator, counts = torch.Generator().manual_seed(0), [int(c) for c in options.counts.split(",")]
    cosines, training = [], []
    for name, (rule, settings) in ESTIMATORS.items():
        row = []
        for count in counts:
            found = []
            for world in range(options.worlds):
                target = EnumerableTarget(world)
                drafter = warm(target, 0.5)
                _, truth = exact_gradient(drafter, target, PARENTS, rule=rule)
                for _ in range(options.repeats):
                    got = estimate(drafter, target, draw(drafter, target, rule, count, generator), rule, settings)
                    found.append(torch.cosine_similarity(got.flatten(), truth.flatten(), 0))
            row.append(round(float(torch.stack(found).mean()), 3))
        cosines.append({"estimator": name, "rule": rule, "cosine_by_rounds": dict(zip(counts, row, strict=True))})
        print(cosines[-1], flush=True)
        ends = []
        for world in range(options.worlds):
            target = EnumerableTarget(world)
            drafter = warm(target, 0.5)
            optimizer = torch.optim.Adam([drafter.table], lr=0.03)
            before, _ = exact_gradient(drafter, target, PARENTS, rule=rule)
            for _ in range(options.steps):
                drafter.table.grad = -estimate(
                    drafter, target, draw(drafter, target, rule, options.rounds, generator), rule, settings
                )
                optimizer.step()
            after, _ = exact_gradient(drafter, target, PARENTS, rule=rule)
            ends.append((float(before), float(after)))
        mean = [round(sum(column) / len(column), 3) for column in zip(*ends, strict=True)]
        worse = sum(after <= before for before, after in ends)
        training.append({"estimator": name, "rule": rule, "expected_accepted": mean, "worlds_that_got_worse": worse})
        print(training[-1], flush=True)
    figures = {
        "tree": PARENTS, "worlds": options.worlds, "repeats": options.repeats, "cosines": cosines,
        "training": {"steps": options.steps, "rounds_a_step": options.rounds, "results": training},
        "served": [served(rule, options.served_steps) for rule in ("sample_and_match", "rejection")],
    }  # fmt: skip
    write_result(__file__, options, figures)


if __name__ == "__main__":
    main()

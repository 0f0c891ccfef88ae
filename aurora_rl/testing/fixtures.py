"""Fixtures of objectives' checks: a drafter with gaps, requests served with it, and a drafter that is the target."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from typing_extensions import override

from aurora_rl.envs import SamplingParams
from aurora_rl.objectives import context_rows
from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape, Unroll
from aurora_rl.testing.tiny import serve, tiny_target
from aurora_rl.tree_index import TreeIndex, true_chains

# Rule, sampling and width; rejection holds for sampled trees only, and some objectives for chains only under it.
_SERVED = (
    ("sample_and_match", SamplingParams(temperature=0.7, top_p=0.9), 2),
    ("greedy", SamplingParams(), 2),
    ("rejection", SamplingParams(temperature=0.7, top_p=0.9), 1),
)


class GappyDrafter(Eagle3Drafter):
    """EAGLE-3 of three depths, whose rows without a prediction hold what a test sets.

    Attributes:
        filler: Step by which such a row rises from token to token.
    """

    max_depth = 3
    filler = 0.0

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        predicted = (trees.root >= 0) & (trees.depth < self.max_depth)
        return self._filled(super().context_logits(batch, trees, wanted), predicted[wanted])

    @override
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        logits, valid, states = super().unroll(batch, steps)
        return Unroll(self._steps_filled(logits, valid), valid, states and self._steps_filled(states, valid))

    def _steps_filled(self, steps: list[Tensor], valid: Tensor) -> list[Tensor]:
        return [self._filled(rows, predicted) for rows, predicted in zip(steps, valid, strict=True)]

    def _filled(self, rows: Tensor, predicted: Tensor) -> Tensor:
        gap = self.filler * torch.arange(rows.shape[1], dtype=rows.dtype)
        return torch.where(predicted[:, None], rows, gap)


class EchoDrafter(Eagle3Drafter):
    """Predicts what the target says, wherever and however deep.

    Attributes:
        head: ``[V, H]``, the target's output head.
        factor: Factor on the target's logits: 1 is the target's law, 0 is even, −1 is the contrary.
    """

    head: Tensor
    factor = 1.0

    @override
    def context_logits(self, batch: TensorDictBase, trees: TreeIndex, wanted: Tensor) -> Tensor:
        rows = context_rows(batch, trees, wanted, ("sequence", "hidden"), ("nodes", "hidden"))
        return self._logits(self.factor * rows["hidden"])

    @override
    def unroll(self, batch: TensorDictBase, steps: int) -> Unroll:
        states = self.factor * batch["sequence", "hidden"]
        _, _, valid = true_chains(batch, steps)
        return Unroll([self._logits(states)] * steps, valid, [states] * steps)

    def _logits(self, states: Tensor) -> Tensor:
        return states @ self.head[self.draft_vocab].T


class ServedTrajectories(NamedTuple):
    """Trajectories, and in words how they were served."""

    how: str
    trajectories: list[TensorDict]


def gappy_drafter(parts: TargetParts, seed: int) -> GappyDrafter:
    """Make a float64 drafter of every other token, with noise: parts that start at zero would hide what they do."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drafter = GappyDrafter.from_target(parts, draft_vocab=torch.arange(0, len(parts.head), 2)).double()
        with torch.no_grad():
            for parameter in drafter.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return drafter


@cache
def served_for_checks(seed: int, *, sampled: bool) -> list[ServedTrajectories]:
    """Serve three requests of a tiny target under three rules: sample-and-match, greedy and, by chains, rejection.

    Trees are by top-k, or drawn at random if ``sampled`` and under rejection. They are kept, since serving takes longer
    than the checks and is the same for all objectives: copy what you may change.
    """
    target, generator = tiny_target(), torch.Generator().manual_seed(seed)
    drafter = gappy_drafter(TargetParts.of(target), seed)
    prompts = [torch.randint(drafter.vocab_size, (n,), generator=generator) for n in (3, 1, 6)]
    out = []
    for rule, sampling, width in _SERVED:
        mode = "sampled" if sampled or rule == "rejection" else "topk"
        trajectories = serve(
            drafter,
            target,
            prompts,
            shape=TreeShape(drafter.max_depth, width, mode=mode),
            max_new_tokens=8,
            num_slots=2,
            sampling_params=replace(sampling, seed=seed),
            rule=rule,
        )
        out.append(ServedTrajectories(f"served by {rule} at temperature {sampling.temperature}", trajectories))
    return out

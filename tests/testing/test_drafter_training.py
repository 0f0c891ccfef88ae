"""check_drafter names what a drafter breaks in training: scores, unrolled predictions and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_drafters import drafter_for
from torch import Tensor

from aurora_rl.policies import Drafter, DrafterPolicy, Eagle3Drafter, MedusaDrafter, TreeShape, Unroll
from aurora_rl.testing import check_drafter, tiny_target, tiny_trajectory
from aurora_rl.testing.drafter_training import check_gradients, check_paths
from aurora_rl.tree_index import TreeIndex


class ForgetsTheDistant(Eagle3Drafter):
    """Its serving cache has a window that its training does not have."""

    def _sequence(self, slots, end):
        keys, values = (part.clone() for part in super()._sequence(slots, end))
        keys[:, : max(end - 16, 0)] = values[:, : max(end - 16, 0)] = 0
        return keys, values


class FeaturesOneEarly(Eagle3Drafter):
    """The field's classic mistake: training pairs a token with the feature of its own position, less one too many."""

    def _read_sequence(self, batch):
        batch = batch.clone()
        batch["sequence", "features"] = batch["sequence", "features"].roll(1, 0)
        return super()._read_sequence(batch)


class RowsShifted(Eagle3Drafter):
    def unroll(self, batch, steps: int) -> Unroll:
        logits, valid, _ = super().unroll(batch, steps)
        return Unroll([step.roll(-1, 0) for step in logits], valid)


class EverythingValid(Eagle3Drafter):
    def unroll(self, batch, steps: int) -> Unroll:
        logits, valid, _ = super().unroll(batch, steps)
        return Unroll(logits, torch.ones_like(valid))


class ReadsPadding(MedusaDrafter):
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        super().extend(slots, tokens, features, torch.full_like(num_new, features.shape[1]))
        self.cached[slots] += num_new - features.shape[1]


class OneHeadForAll(MedusaDrafter):
    def _states(self, head: int, features: Tensor) -> Tensor:
        return (1 + head) * super()._states(0, features)  # depths differ, else all would tie


class ScoresWithoutGradient(MedusaDrafter):
    @torch.no_grad()
    def score(self, batch) -> Tensor:
        return super().score(batch)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (FeaturesOneEarly, "differs by .* nats from what serving recorded .*feature t with token t \\+ 1"),
        (ForgetsTheDistant, "from what serving recorded"),
        (RowsShifted, "unroll at step 0 .* differs by .* nats from the score of a chain of the true tokens"),
        (EverythingValid, "must be invalid: nothing is before it"),
        (ReadsPadding, "from what serving recorded"),
        (OneHeadForAll, "'blocks.1.layers.0.weight' no gradient"),
        (ScoresWithoutGradient, "score is not differentiable"),
    ],
)
def test_check_names_what_a_drafter_breaks(kind: type[Drafter], message: str) -> None:
    target = tiny_target()
    with pytest.raises(AssertionError, match=message):
        check_drafter(drafter_for(kind, target), target)


class CountsItsTree(MedusaDrafter):
    def context_logits(self, batch, trees: TreeIndex, wanted: Tensor) -> Tensor:
        size = batch["rounds", "offset"].diff()
        drafted_in = torch.repeat_interleave(torch.arange(len(size)), size)
        of_context = torch.cat([size, size[drafted_in]]) if len(trees.depth) else size
        return super().context_logits(batch, trees, wanted) * (1 + 0.01 * of_context[wanted])[:, None]


def test_scores_that_depend_on_other_branches_are_caught() -> None:
    target = tiny_target()
    trajectories = [tiny_trajectory(drafter_for(MedusaDrafter, target), shape=TreeShape(3, 2))]
    check_paths(drafter_for(MedusaDrafter, target), trajectories)
    with pytest.raises(AssertionError, match="score of a node depends on other branches"):
        check_paths(drafter_for(CountsItsTree, target), trajectories)


class KeepsALayerToItself(Eagle3Drafter):
    """One of its parameters is trained and not published."""

    def published(self) -> dict[str, Tensor]:
        return {name: t for name, t in super().published().items() if name != "norm.weight"}

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        return super().stage({**weights, "norm.weight": self.norm.weight})


def test_a_parameter_that_is_not_published_is_caught() -> None:
    drafter = drafter_for(KeepsALayerToItself, tiny_target())
    with pytest.raises(AssertionError, match="the parameter 'norm.weight' is not published"):
        check_gradients(drafter, [tiny_trajectory(drafter)], ())


@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_check_catches_a_shift_in_serving(kind: type[Drafter], monkeypatch: pytest.MonkeyPatch) -> None:
    catch_up = DrafterPolicy._catch_up

    def shifted(self: DrafterPolicy, slots: Tensor, rows: int | None) -> Tensor:
        features = self._store.features
        self._store.features = features.roll(-1, 1)
        level = catch_up(self, slots, rows)
        self._store.features = features
        return level

    monkeypatch.setattr(DrafterPolicy, "_catch_up", shifted)
    target = tiny_target()
    with pytest.raises(AssertionError, match="from what serving recorded"):
        check_drafter(drafter_for(kind, target), target)


def test_exempt_tensors_need_no_gradient() -> None:
    target = tiny_target()
    drafter = drafter_for(OneHeadForAll, target)
    exempt = [
        name for name in drafter.published() if name.startswith(("blocks", "lm_heads")) and ".0." not in name[:11]
    ]
    check_drafter(drafter, target, without_gradient=exempt)

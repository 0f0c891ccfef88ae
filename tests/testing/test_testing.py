"""The conformance checks pass what is right and name what is wrong."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from aurora_rl.envs import TransformersEngine
from aurora_rl.policies import (
    Drafter,
    DrafterPolicy,
    Eagle3Drafter,
    EagleDrafter,
    MedusaDrafter,
    Proposal,
    TargetParts,
    TreeShape,
    Unroll,
)
from aurora_rl.testing import check_drafter, check_engine, serve, tiny_target, tiny_trajectory, topk_form
from aurora_rl.testing.drafter_training import check_gradients, check_paths
from aurora_rl.testing.drafter_weights import check_swap
from aurora_rl.trajectories import validate
from aurora_rl.tree_index import TreeIndex

VOCAB = torch.arange(0, 32, 2)  # half of the tokens are outside


def make(kind: type[Drafter], target: PreTrainedModel) -> Drafter:
    torch.manual_seed(0)
    return kind.from_target(TargetParts.of(target), draft_vocab=VOCAB).to(target.dtype)


# ---- tiny models and trajectories -----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_tiny_target_is_deterministic_and_leaves_the_global_generator_alone(architecture: str) -> None:
    before = torch.random.get_rng_state()
    first, second = (dict(tiny_target(architecture).named_parameters()) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert next(iter(first.values())).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiny_trajectory_is_legal_and_always_the_same(dtype: torch.dtype) -> None:
    drafter = make(MedusaDrafter, tiny_target(dtype=dtype))
    modules = [type(m) for m in drafter.modules()]
    first, second = (tiny_trajectory(drafter, prompt_length=3, max_new_tokens=6, request=4) for _ in range(2))
    validate(first, vocab_size=32, feature_size=16, hidden_size=16)
    assert all(torch.equal(first[key], second[key]) for key in first.keys(True, True))
    assert first["sequence", "features"].dtype == dtype
    assert (
        len(first["sequence", "tokens"]) == 9
        and int(first["sequence", "prompt_length"]) == 3
        and int(first["request"]) == 4
    )
    assert modules == [type(m) for m in drafter.modules()]  # a copy was put into inference form


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_topk_form_is_the_softmax_of_the_hidden_states(dtype: torch.dtype) -> None:
    target = tiny_target(dtype=dtype)
    trajectory = tiny_trajectory(make(MedusaDrafter, target), prompt_length=3, max_new_tokens=6)
    before, head = trajectory.clone(), TargetParts.of(target).head.to(torch.promote_types(dtype, torch.float32))
    got = topk_form(trajectory, head, 3)
    assert all(torch.equal(trajectory[key], before[key]) for key in before.keys(True, True))
    validate(got, vocab_size=32, feature_size=16, hidden_size=16)
    for part in ("sequence", "nodes"):
        p = (trajectory[part, "hidden"].to(head.weight.dtype) @ head.weight.T).softmax(-1)
        best = p.topk(3, dim=-1)
        assert torch.equal(got[part, "topk_ids"], best.indices)
        assert got[part, "topk_log_probs"].dtype == head.weight.dtype
        torch.testing.assert_close(got[part, "topk_log_probs"].exp(), best.values)
        torch.testing.assert_close(got[part, "tail_log_prob"].exp(), 1 - best.values.sum(-1), atol=1e-5, rtol=0)


def test_serving_gives_every_prompt_its_trajectory_in_order() -> None:
    target = tiny_target()
    prompts = [torch.arange(n) for n in (4, 1, 2)]
    trajectories = serve(make(MedusaDrafter, target), target, prompts, shape=TreeShape(2), num_slots=2, first_request=7)
    assert [int(t["request"]) for t in trajectories] == [7, 8, 9]
    assert [t["sequence", "tokens"][: len(p)].tolist() for t, p in zip(trajectories, prompts, strict=True)] == [
        p.tolist() for p in prompts
    ]


# ---- drafters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Eagle3Drafter, EagleDrafter, MedusaDrafter])
@pytest.mark.parametrize(
    ("architecture", "dtype"), [("llama", torch.float64), ("llama", torch.float32), ("qwen3", torch.float64)]
)
def test_drafters_conform(kind: type[Drafter], architecture: str, dtype: torch.dtype) -> None:
    target = tiny_target(architecture, dtype=dtype)
    check_drafter(make(kind, target), target)


def test_check_leaves_the_drafter_and_the_target_as_they_are() -> None:
    target = tiny_target()
    drafter = make(MedusaDrafter, target)
    before, model = copy.deepcopy(drafter.published()), copy.deepcopy(target.state_dict())
    check_drafter(drafter, target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in drafter.published().items())
    assert all(torch.equal(tensor, model[name]) for name, tensor in target.state_dict().items())


def test_check_needs_a_dtype_that_tells_mistakes_from_rounding() -> None:
    target = tiny_target(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float64 or float32, got torch.bfloat16"):
        check_drafter(make(MedusaDrafter, target), target)


class ForgetsTheDistant(Eagle3Drafter):
    """Its serving cache has a window that its training does not have."""

    def _sequence(self, slots, end):
        keys, values = (part.clone() for part in super()._sequence(slots, end))
        keys[:, : max(end - 16, 0)] = values[:, : max(end - 16, 0)] = 0
        return keys, values


class SaysNoDepth(MedusaDrafter):
    """It has four heads, and does not say so."""

    @property
    def max_depth(self) -> float:
        return float("inf")

    @max_depth.setter
    def max_depth(self, depth: float) -> None:
        pass


class ListsItsLayers(Eagle3Drafter):
    """Lists and tuples differ on the wire."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.feature_layers = list(self.feature_layers)


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


class DraftingMovesTheState(Eagle3Drafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        self._state[slots] *= 1.1
        return proposal


class KeepsKeysWithoutValues(Eagle3Drafter):
    def cache_rows(self, slot: int) -> list[Tensor]:
        return super().cache_rows(slot)[:1]


class InstallsUntilItFails(Eagle3Drafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        if "fc.weight" in weights and weights["fc.weight"].shape == self.fc.weight.shape:
            self.fc.weight.data.copy_(weights["fc.weight"])
        return super().stage(weights)


class ReadsPadding(MedusaDrafter):
    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        super().extend(slots, tokens, features, torch.full_like(num_new, features.shape[1]))
        self.cached[slots] += num_new - features.shape[1]


class OneHeadForAll(MedusaDrafter):
    def _predict(self, head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        return super()._predict(0, features)


class TokensOutsideTheVocabulary(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        return proposal._replace(tokens=proposal.tokens + 1)


class OverBudget(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        return super().propose(slots, TreeShape(shape.depth, shape.width + 1) if shape.depth else shape, generator)


class ScoresWithoutGradient(MedusaDrafter):
    @torch.no_grad()
    def score(self, batch) -> Tensor:
        return super().score(batch)


class LearnsInTheTarget(MedusaDrafter):
    """Its last head is the target's own."""

    @classmethod
    def from_target(cls, parts: TargetParts, *, draft_vocab: Tensor, **options) -> LearnsInTheTarget:
        drafter = super().from_target(parts, draft_vocab=torch.arange(len(parts.head)), **options)
        drafter.lm_heads[-1].weight = nn.Parameter(parts.head.weight)
        return drafter


class SaysUniform(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        uniform = None if proposal.q is None else torch.full_like(proposal.q, 1 / len(self.draft_vocab))
        return proposal._replace(q=uniform)


class HalvesItsLaw(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        proposal = super().propose(slots, shape, generator)
        return proposal._replace(q=None if proposal.q is None else proposal.q / 2)


class DrawsOnItsOwn(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        return super().propose(slots, shape)


class DrawsAlwaysTheSame(MedusaDrafter):
    def propose(self, slots: Tensor, shape: TreeShape, generator: torch.Generator | None = None) -> Proposal:
        return super().propose(slots, shape, torch.Generator().manual_seed(0))


class TakesAnyMap(MedusaDrafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        return super().stage({**weights, "d2t": self.published()["d2t"]} if "d2t" in weights else weights)


class InstallsWhileItStages(MedusaDrafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        put = super().stage(weights)
        put()
        return put


class KeepsTheCallersTensors(MedusaDrafter):
    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        put = super().stage(weights)

        def install() -> None:
            put()
            for name, parameter in self.named_parameters():
                parameter.data = weights[name].to(parameter.dtype)

        return install


class KnowsNoFolder(MedusaDrafter):
    @classmethod
    def recognizes(cls, config) -> bool:
        return False


class LosesItsOptions(MedusaDrafter):
    @classmethod
    def read(cls, checkpoint, parts: TargetParts, layout: str, **options) -> LosesItsOptions:
        drafter = super().read(checkpoint, parts, layout, **options)
        drafter.options = {}
        return drafter


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LearnsInTheTarget, "no gradient may reach the target, and 'lm_heads.3.weight' shares its memory"),
        (SaysUniform, "q of a drawn token is not exp\\(log_probs\\)"),
        (HalvesItsLaw, "a row of q does not sum to 1"),
        (DrawsOnItsOwn, "ignores the generator: one seed gave two trees"),
        (DrawsAlwaysTheSame, "draws nothing: seeds do not matter"),
        (TakesAnyMap, "install takes weights whose tensor 'd2t' is missing, misshapen, unknown or false"),
        (InstallsWhileItStages, "proposals change when weights are staged, and not only when they are installed"),
        (KeepsTheCallersTensors, "proposals change with the tensors that were given to stage"),
        (KnowsNoFolder, "recognizes is false for the drafter's own folder"),
        (LosesItsOptions, "options change to {} by way of the format"),
        (FeaturesOneEarly, "differs by .* nats from what serving recorded .*feature t with token t \\+ 1"),
        (ListsItsLayers, "feature_layers is no tuple of integers"),
        (SaysNoDepth, "a chain of 4 nodes, max_depth is inf"),
        (ForgetsTheDistant, "from what serving recorded"),
        (RowsShifted, "unroll at step 0 .* differs by .* nats from the score of a chain of the true tokens"),
        (EverythingValid, "must be invalid: nothing is before it"),
        (DraftingMovesTheState, "proposals change when asked for again"),
        (KeepsKeysWithoutValues, "proposals change when a slot takes over the rows that cache_rows gives of another"),
        (InstallsUntilItFails, "'fc.weight' changes when weights are refused for"),
        (ReadsPadding, "from what serving recorded"),
        (OneHeadForAll, "'blocks.1.layers.0.weight' no gradient"),
        (TokensOutsideTheVocabulary, "a token is outside the draft vocabulary"),
        (OverBudget, "expected \\[4, 1..1\\] nodes"),
        (ScoresWithoutGradient, "score is not differentiable"),
    ],
)
def test_check_names_what_a_drafter_breaks(kind: type[Drafter], message: str) -> None:
    target = tiny_target()
    with pytest.raises(AssertionError, match=message):
        check_drafter(make(kind, target), target)


class CountsItsTree(MedusaDrafter):
    def context_logits(self, batch, trees: TreeIndex, wanted: Tensor) -> Tensor:
        size = batch["rounds", "offset"].diff()
        drafted_in = torch.repeat_interleave(torch.arange(len(size)), size)
        of_context = torch.cat([size, size[drafted_in]]) if len(trees.depth) else size
        return super().context_logits(batch, trees, wanted) * (1 + 0.01 * of_context[wanted])[:, None]


def test_scores_that_depend_on_other_branches_are_caught() -> None:
    target = tiny_target()
    trajectories = [tiny_trajectory(make(MedusaDrafter, target), shape=TreeShape(3, 2))]
    check_paths(make(MedusaDrafter, target), trajectories)
    with pytest.raises(AssertionError, match="score of a node depends on other branches"):
        check_paths(make(CountsItsTree, target), trajectories)


class KeepsALayerToItself(Eagle3Drafter):
    """One of its parameters is trained and not published."""

    def published(self) -> dict[str, Tensor]:
        return {name: t for name, t in super().published().items() if name != "norm.weight"}

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        return super().stage({**weights, "norm.weight": self.norm.weight})


def test_a_parameter_that_is_not_published_is_caught() -> None:
    drafter = make(KeepsALayerToItself, tiny_target())
    with pytest.raises(AssertionError, match="the parameter 'norm.weight' is not published"):
        check_gradients(drafter, [tiny_trajectory(drafter)], ())


class DraftsWithTheOldWeights(MedusaDrafter):
    """Serves with the heads that it began with, whatever is installed."""

    def _predict(self, head: int, features: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_inference_mode_enabled():
            (first,) = self.__dict__.setdefault("_first", (copy.deepcopy(self.lm_heads),))  # in a tuple: no submodule
            return features, first[head](features.to(first[head].weight.dtype))
        return super()._predict(head, features)


def test_drafts_of_replaced_weights_are_caught() -> None:
    target = tiny_target()
    drafter = make(DraftsWithTheOldWeights, target)
    for parameter in drafter.blocks.parameters():
        parameter.data.zero_()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([7, 8])]
    with pytest.raises(AssertionError, match="drafts made after a swap differ by .* nats"):
        check_swap(drafter, target, prompts, generator)


@pytest.mark.parametrize("kind", [Eagle3Drafter, MedusaDrafter])
def test_check_catches_a_shift_in_serving(kind: type[Drafter], monkeypatch: pytest.MonkeyPatch) -> None:
    catch_up = DrafterPolicy._catch_up

    def shifted(self: DrafterPolicy, slots: Tensor) -> None:
        features = self._store.features
        self._store.features = features.roll(-1, 1)
        catch_up(self, slots)
        self._store.features = features

    monkeypatch.setattr(DrafterPolicy, "_catch_up", shifted)
    target = tiny_target()
    with pytest.raises(AssertionError, match="from what serving recorded"):
        check_drafter(make(kind, target), target)


def test_exempt_tensors_need_no_gradient() -> None:
    target = tiny_target()
    drafter = make(OneHeadForAll, target)
    exempt = [
        name for name in drafter.published() if name.startswith(("blocks", "lm_heads")) and ".0." not in name[:11]
    ]
    check_drafter(drafter, target, without_gradient=exempt)


# ---- engines --------------------------------------------------------------------------------------------------------


class WrongFeatures(TransformersEngine):
    def commit(self, *args: Tensor) -> Tensor:
        self._features = self._features.roll(1, 1)
        return super().commit(*args)


class NothingMoved(TransformersEngine):
    def commit(self, slots: Tensor, path: Tensor, tokens: Tensor, num_new: Tensor) -> Tensor:
        features = super().commit(slots, path, tokens, num_new)
        for shape, block in self._cache.blocks.items():
            block[:, slots] = self._saved[shape][:, slots]
        return features

    def verify(self, *args: Tensor) -> Tensor:
        hidden = super().verify(*args)
        self._saved = {shape: block.clone() for shape, block in self._cache.blocks.items()}
        return hidden


class CausalMask(TransformersEngine):
    def _forward(self, slots: Tensor, past: Tensor, tokens: Tensor, depth: Tensor, seen: Tensor) -> tuple:
        return super()._forward(slots, past, tokens, depth, torch.ones_like(seen).tril())


class PositionsInARow(TransformersEngine):
    def _forward(self, slots: Tensor, past: Tensor, tokens: Tensor, depth: Tensor, seen: Tensor) -> tuple:
        row = torch.arange(depth.shape[1]).expand_as(depth)
        return super()._forward(slots, past, tokens, row, seen)


class WrongHead(TransformersEngine):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).roll(1, -1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongFeatures, "features that commit gave for slot 0"),
        (NothingMoved, "hidden, slot"),
        (CausalMask, "hidden, slot"),
        (PositionsInARow, "hidden, slot"),
        (WrongHead, "logits, slot"),
    ],
)
def test_check_names_what_an_engine_breaks(kind: Callable[..., TransformersEngine], message: str) -> None:
    engine = TransformersEngine(tiny_target(), num_slots=3, max_length=64, feature_layers=(0, 2))
    engine.__class__ = kind  # not before: the engine's own check would refuse what is broken
    with pytest.raises(AssertionError, match=message):
        check_engine(engine, tiny_target(), feature_layers=(0, 2))


def test_check_catches_layers_in_another_order() -> None:
    engine = TransformersEngine(tiny_target(), num_slots=1, max_length=64, feature_layers=(2, 0))
    with pytest.raises(AssertionError, match="features"):
        check_engine(engine, tiny_target(), feature_layers=(0, 2))

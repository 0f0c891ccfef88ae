"""Trees of drafter and lookup: merged by definition, and ranked by chances that are learned from what came true."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, TargetParts, TreeShape, get_drafter, merging
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.policies.lookup import Tree, ngram_tree
from aurora_rl.policies.merging import _KEPT, _LEAST_VARIANCE, _PRECISION, _START, Chances, TreeMerger
from aurora_rl.testing import tiny_target
from aurora_rl.training.gate import replay

NO_TREE = Tree([], [], [])
Paths = dict[tuple[int, ...], float]


@st.composite
def trees(draw: st.DrawFn, most: int = 8) -> Paths:
    """Paths with their log-probabilities, siblings differ."""
    paths: Paths = {}
    for _ in range(draw(st.integers(0, most))):
        parent = draw(st.sampled_from([(), *paths]))
        paths.setdefault((*parent, draw(st.integers(0, 3))), draw(st.floats(-5, 0)))
    return paths


def as_tree(paths: Paths) -> Tree:
    index = {path: i for i, path in enumerate(paths)}
    return Tree([p[-1] for p in paths], [index.get(p[:-1], -1) for p in paths], list(paths.values()))


def as_paths(tokens: Iterable[int], parents: Iterable[int], log_probs: Iterable[float]) -> Paths:
    paths: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        assert -1 <= parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, log_probs, strict=True))


def stated(tree: Paths, path: tuple[int, ...]) -> float:
    return math.exp(tree[path]) if path in tree else math.nan


def merged_by_definition(drafted: Paths, found: Paths, num_nodes: int, chances: Chances, least: float = 0.0) -> Paths:
    """The likeliest paths of both; of equal ones the drafter's."""

    def chance(path: tuple[int, ...]) -> float:
        return float(chances.of(np.array([stated(drafted, path)]), np.array([stated(found, path)]))[0])

    def joint(path: tuple[int, ...]) -> float:
        return math.prod(chance(path[:end]) for end in range(1, len(path) + 1))

    every = [*drafted, *(path for path in found if path not in drafted)]
    best = sorted(every, key=lambda path: -joint(path))[:num_nodes]
    return {path: drafted.get(path, -math.inf) for path in best if joint(path) >= least}


def taught(seed: int) -> Chances:
    """Chances that have learned from random outcomes."""
    draw, chances = np.random.default_rng(seed), Chances()
    for _ in range(30):
        drafted, looked_up = draw.random(6), draw.random(6)
        drafted[:2], looked_up[2:4] = np.nan, np.nan
        chances.learn(drafted, looked_up, draw.random(6) < np.where(np.isnan(drafted), looked_up, 0.5))
    return chances


@given(trees(), trees(), st.integers(0, 12), st.sampled_from([0.0, 0.1, 0.4]), st.integers(0, 3))
def test_the_likeliest_paths_of_both_are_kept(
    drafted: Paths, found: Paths, num_nodes: int, least: float, seed: int
) -> None:
    chances = taught(seed)
    merged = TreeMerger(chances).merge(0, 1, as_tree(drafted), as_tree(found), num_nodes, least)
    assert as_paths(*merged) == merged_by_definition(drafted, found, num_nodes, chances, least)


def test_a_drafter_s_rounding_makes_no_node_likelier_than_its_parent() -> None:
    tree = TreeMerger().merge(0, 1, Tree([5, 6], [-1, 0], [0.0005, 0.0005]), Tree([7], [-1], [-0.1]), 2)
    assert tree.tokens == [5, 6] and tree.parents == [-1, 0]


# ---- what is learned ------------------------------------------------------------------------------------------------


def slowly(drafted: float, looked_up: float) -> list[float]:
    """The seven regressors of a token, written out."""

    def odds(chance: float) -> float:
        return math.log(chance / (1 - chance))

    if math.isnan(looked_up):
        return [1, odds(drafted), 0, 0, 0, 0, 0]
    if math.isnan(drafted):
        return [0, 0, 1, odds(looked_up), 0, 0, 0]
    return [0, 0, 0, 0, 1, odds(drafted), odds(looked_up)]


def test_each_outcome_is_a_newton_step_under_a_precision_that_forgets() -> None:
    draw, chances = np.random.default_rng(0), Chances()
    weights, precision = _START.copy(), _PRECISION.copy()
    for count in (1, 4, 7, 2):
        drafted, looked_up = draw.uniform(0.05, 0.95, count), draw.uniform(0.05, 0.95, count)
        case = draw.integers(3, size=count)
        drafted[case == 1], looked_up[case == 0] = np.nan, np.nan
        came_true = draw.random(count) < 0.5
        rows = [np.array(slowly(*pair)) for pair in zip(drafted, looked_up, strict=True)]
        before = [1 / (1 + math.exp(-float(row @ weights))) for row in rows]
        assert chances.of(drafted, looked_up) == pytest.approx(before, rel=1e-12)
        precision = _KEPT**count * precision + (1 - _KEPT**count) * _PRECISION
        step = np.zeros(7)
        for row, chance, true in zip(rows, before, came_true, strict=True):
            precision += max(chance * (1 - chance), _LEAST_VARIANCE) * np.outer(row, row)
            step += row * (float(true) - chance)
        weights = weights + np.linalg.inv(precision) @ step
        chances.learn(drafted, looked_up, came_true)
        assert chances.of(drafted, looked_up) == pytest.approx(
            [1 / (1 + math.exp(-float(row @ weights))) for row in rows], rel=1e-9
        )


def test_chances_come_to_those_that_tokens_have() -> None:
    """Each source errs in its own way, and changes it in mid-run, as a drafter that is swapped."""
    draw, chances = np.random.default_rng(1), Chances()
    grid = np.array([0.1, 0.3, 0.5, 0.7, 0.9])
    none = np.full(5, np.nan)
    for too_sure in (0.2, 0.9):

        def truth(drafted: np.ndarray, looked_up: np.ndarray, too_sure: float = too_sure) -> np.ndarray:
            alone = np.where(np.isnan(looked_up), too_sure * drafted, 0.8 * looked_up)
            return np.where(np.isnan(drafted) | np.isnan(looked_up), alone, 0.1 + 0.8 * drafted * looked_up)

        for _ in range(1500):
            drafted, looked_up = draw.choice(grid, 5), draw.choice(grid, 5)
            drafted[:2], looked_up[2:4] = np.nan, np.nan
            chances.learn(drafted, looked_up, draw.random(5) < truth(drafted, looked_up))
        for pair in ((grid, none), (none, grid), (grid, grid)):
            assert np.abs(chances.of(*pair) - truth(*pair)).max() < 0.12


def test_a_source_that_is_silent_for_long_is_not_forgotten_into_wild_steps() -> None:
    chances, none = Chances(), np.array([np.nan])
    for _ in range(50_000):
        chances.learn(np.array([0.5]), none, np.array([True]))
    before = chances.of(none, np.array([0.5]))
    chances.learn(none, np.array([0.5]), np.array([False]))
    assert 0 < before[0] - chances.of(none, np.array([0.5]))[0] < 0.02


def test_what_is_learned_goes_on_from_its_state() -> None:
    chances, again = taught(0), Chances()
    again.load_state_dict(chances.state_dict())
    for each in (chances, again):
        each.learn(np.array([0.4, np.nan]), np.array([np.nan, 0.2]), np.array([True, False]))
    assert again.state_dict() == chances.state_dict()


class Noting(Chances):
    """Chances that note what they are taught."""

    def __init__(self) -> None:
        super().__init__()
        self.lessons: list[tuple[list[float], list[float], list[bool]]] = []

    def learn(self, drafted: np.ndarray, looked_up: np.ndarray, came_true: np.ndarray) -> None:
        self.lessons.append((drafted.tolist(), looked_up.tolist(), came_true.tolist()))
        super().learn(drafted, looked_up, came_true)


def test_what_is_known_of_the_candidates_is_learned_whether_they_were_verified_or_not() -> None:
    chances = Noting()
    merger = TreeMerger(chances)
    half, third = math.log(1 / 2), math.log(1 / 3)
    # 5 with children 6 and 7, and 8 beside it; lookup has 5 and 9 after it.
    drafted, found = Tree([5, 8, 6, 7], [-1, -1, 0, 2], [half, third, half, half]), Tree([5, 9], [-1, 0], [third, half])
    kept = merger.merge(3, 2, drafted, found, num_nodes=1)
    assert kept.tokens == [5] and not chances.lessons
    merger.learn(4, np.array([1, 2, 5]))  # another slot
    assert not chances.lessons
    # The target said 5 and 9: of what comes after 6, which it did not say, nothing is known.
    merger.learn(3, np.array([1, 2, 5, 9]))
    merger.learn(3, np.array([1, 2, 5, 9, 9]))  # what is known is learned once
    ((by_drafter, by_lookup, true),) = chances.lessons
    assert np.array(by_drafter) == pytest.approx([1 / 2, 1 / 3, 1 / 2, math.nan], nan_ok=True)
    assert np.array(by_lookup) == pytest.approx([1 / 3, math.nan, math.nan, 1 / 2], nan_ok=True)
    assert true == [True, False, False, True]


def test_of_what_lies_beyond_the_text_nothing_is_known() -> None:
    chances = Noting()
    merger = TreeMerger(chances)
    merger.merge(0, 1, Tree([5, 6], [-1, 0], [-1.0, -1.0]), NO_TREE, 2)
    merger.learn(0, np.array([1, 5]))
    assert [true for _, _, true in chances.lessons] == [[True]]


def test_another_request_in_the_slot_says_nothing_of_the_one_before() -> None:
    chances = Noting()
    merger = TreeMerger(chances)
    merger.merge(0, 1, Tree([5], [-1], [-1.0]), NO_TREE, 1)
    merger.forget([0, 7])
    merger.learn(0, np.array([1, 5]))
    assert not chances.lessons


def test_requests_of_a_salt_learn_together_and_nobody_else_does_until_they_are_deleted() -> None:
    merger, tree = TreeMerger(), Tree([5], [-1], [-1.0])
    start = Chances().state_dict()
    for slot, salt in enumerate(("acme@x", None, "acme@x")):
        merger.merge(slot, 1, tree, NO_TREE, 1, salt=salt)
        merger.learn(slot, np.array([1, 5]))
    assert merger.chances("globex@x").state_dict() == start
    once, twice = (merger.chances(salt)._weights[0] for salt in (None, "acme@x"))
    assert _START[0] < once < twice
    merger.merge(0, 1, tree, NO_TREE, 1, salt="acme@x")
    merger.merge(1, 1, tree, NO_TREE, 1)
    merger.delete("acme")
    for slot in (0, 1):
        merger.learn(slot, np.array([1, 5]))
    assert merger.chances("acme@x").state_dict() == start and merger.chances()._weights[0] > once


def test_ever_new_salts_take_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_MOST_SALTS", 3)
    merger = TreeMerger()
    first = merger.chances("a")
    for salt in ("b", "a", "c", "d"):
        merger.chances(salt)
    assert list(merger._learned) == ["a", "c", "d"] and merger.chances("a") is first


# ---- in the policy --------------------------------------------------------------------------------------------------

SHAPES = [(4, 4, 4), (1, 1, 3), (1, 1, 1), (3, 2, 6), (2, 3, None)]


@pytest.mark.parametrize(
    ("name", "lookup"), [*((name, 2) for name in ("eagle3", "eagle", "dflash", "standalone", "ngram")), ("medusa", 1),
                         ("medusa", 3), ("medusa", 8)]
)  # fmt: skip
def test_the_policy_merges_lookup_into_any_drafters_tree(name: str, lookup: int) -> None:
    """Round by round, on texts that repeat themselves, against the trees of the drafter alone and the definitions."""
    target = tiny_target(vocab_size=8)
    torch.manual_seed(0)
    drafter = get_drafter(name).from_target(TargetParts.of(target), draft_vocab=torch.arange(0, 8, 2)).double()
    engine = TransformersEngine(target, num_slots=3, max_length=50, feature_layers=drafter.feature_layers)
    queue = [
        Request(i, torch.tensor([1, 2, 3] * (i + 1))[: 5 * i + 1], SamplingParams(max_tokens=14 + i)) for i in range(4)
    ]
    env = SpecDecodeEnv(engine, lambda: queue.pop(0) if queue else None, num_nodes=15)
    wide, policy = (
        DrafterPolicy(copy.deepcopy(drafter), engine.store, num_nodes=nodes, shape=TreeShape(1)) for nodes in (45, 15)
    )
    start = policy.merger.chances().state_dict()
    td, merges = env.reset(), 0
    while env.num_active:
        drafts: dict[tuple, tuple[TensorDict, TensorDict]] = {}
        for depth, width, nodes in SHAPES:
            policy.shape = shape = TreeShape(depth, width, nodes, lookup=lookup)
            wide.shape = TreeShape(depth, width, 3 * shape.num_nodes)
            drafts[depth, width, shape.num_nodes] = wide(td.clone())["draft"], policy(td.clone())["draft"]
        for slot in engine.store.occupied.tolist():
            text = engine.store.tokens[slot, : engine.store.lengths[slot]].tolist()
            for (_, _, nodes), pair in drafts.items():
                before, after = (
                    as_paths(
                        *(draft[key][slot][draft["mask"][slot]].tolist() for key in ("tokens", "parents", "log_probs"))
                    )
                    for draft in pair
                )
                found = ngram_tree(text, TreeShape(6, 4, lookup=lookup).without_drafter(lookup))
                looked_up = as_paths(*found) if len(text) > 1 else {}
                assert after == merged_by_definition(before, looked_up, nodes, policy.merger.chances())
                merges += after != before
        _, td = env.step_and_maybe_reset(policy(td))
    assert merges > 20
    assert policy.merger.chances().state_dict() != start


def test_served_with_lookup_is_replayed_with_what_was_known_of_both(tmp_path: object) -> None:
    """One slot: requests come one after the other in serving as in replay, so that both learn the same."""
    target = tiny_target(vocab_size=8)
    torch.manual_seed(0)
    drafter = get_drafter("medusa").from_target(TargetParts.of(target), draft_vocab=torch.arange(0, 8, 2)).double()
    requests = [Request(i, torch.tensor([1, 2, 3, 1, 2, i]), SamplingParams(max_tokens=30)) for i in range(5)]
    shape, served = TreeShape(3, 3, 4, lookup=4), []
    decoder = SpeculativeDecoder(
        target, drafter, requests, shape=shape, max_length=64, num_slots=1,
        on_completion=lambda completion: served.append(completion.trajectory),
    )  # fmt: skip
    for _ in decoder.rounds():
        pass
    chances, rounds = Chances(), []
    for trajectory in served:
        rounds += replay(drafter.serving_copy(torch.float64), [trajectory], shape, None, chances).rounds.tolist()
    assert rounds == [len(each["rounds", "anchor"]) for each in served]
    assert chances.state_dict() == decoder.policy.merger.chances().state_dict()

"""Lookup against a search written as its definition: the trees made of it, and how they go into a drafter's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, NgramDrafter, TargetParts, TreeShape, get_drafter
from aurora_rl.policies.lookup import Tree, continuations, merged, ngram_tree
from aurora_rl.testing import tiny_target

texts = st.lists(st.integers(0, 2), max_size=20)  # few tokens, so that runs come again

NINE = SamplingParams(max_tokens=9)


def search(text: list[int]) -> dict[int, Fraction]:
    """The definition: the longest run that came before, each place half as heavy as the next later one."""
    for size in (4, 3, 2):
        places = [i for i in range(len(text) - size) if text[i : i + size] == text[len(text) - size :]]
        if size < len(text) and places:
            weights: dict[int, Fraction] = {}
            for age, place in enumerate(reversed(places)):
                following = text[place + size]
                weights[following] = weights.get(following, Fraction(0)) + Fraction(1, 2**age)
            return {token: weight / sum(weights.values()) for token, weight in weights.items()}
    return {}


@given(texts)
def test_continuations_are_those_of_the_longest_match(text: list[int]) -> None:
    found = continuations(text)
    assert {token: pytest.approx(float(p)) for token, p in search(text).items()} == found
    assert list(found.values()) == sorted(found.values(), reverse=True)


def test_a_match_may_overlap_the_end() -> None:
    assert continuations([1, 1, 1]) == {1: 1.0}
    assert list(continuations([8, 5, 6, 5, 6, 5, 6])) == [5]


def test_one_token_alone_is_no_match() -> None:
    assert continuations([3, 4, 3]) == {} == continuations([])


def test_a_long_text_that_repeats_itself_is_drafted_for() -> None:
    """The weight of what followed more than a thousand occurrences ago is no float above 0."""
    text = [1, 2, 3, 4, 9] + [1, 2, 3, 4, 5] * 1100 + [1, 2, 3, 4]
    assert continuations(text) == {5: 1.0}
    assert ngram_tree(text, TreeShape(2, 2, 4)).tokens == [5, 1]


@given(texts, st.integers(0, 3), st.integers(1, 3), st.integers(3, 9))
def test_the_tree_holds_the_likeliest_paths(text: list[int], depth: int, width: int, num_nodes: int) -> None:
    tree = ngram_tree(text, TreeShape(depth, width, num_nodes))
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    # All paths by brute force, with the chance of each.
    chance: dict[tuple[int, ...], Fraction] = {(): Fraction(1)}
    for length in range(depth):
        for path in [p for p in chance if len(p) == length]:
            best = sorted(search([*text, *path]).items(), key=lambda item: -item[1])[:width]
            chance |= {(*path, token): chance[path] * p for token, p in best}
    del chance[()]
    assert len(set(paths)) == len(paths) == min(len(chance), TreeShape(depth, width, num_nodes).num_nodes)
    # Of equal ones any may be there.
    assert sorted(chance[p] for p in paths) == sorted(chance.values(), reverse=True)[: len(paths)][::-1]
    for path, log_prob in zip(paths, tree.log_probs, strict=True):
        assert log_prob == pytest.approx(math.log(float(search([*text, *path[:-1]])[path[-1]])))


def test_a_slot_without_a_match_has_no_nodes() -> None:
    drafter = NgramDrafter(10)
    drafter.allocate(2, 8)
    text = torch.tensor([[7, 8, 1, 7, 8], [1, 2, 3, 4, 5]])
    drafter.extend(torch.arange(2), text, torch.zeros(2, 4, 0), torch.tensor([4, 4]))
    proposal = drafter.propose(torch.arange(2), TreeShape(2))
    assert proposal.mask is not None
    assert proposal.tokens[0].tolist() == [1, 7] and proposal.mask.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("mode", ["sampled", "sampled_without_replacement"])
def test_sampled_trees_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="no distribution over all tokens"):
        NgramDrafter(10).propose(torch.tensor([0]), TreeShape(1, mode=mode))


# ---- merged into a drafter's tree -----------------------------------------------------------------------------------

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


def merged_by_definition(drafted: Paths, found: Iterable[tuple[int, ...]], num_nodes: int) -> Paths:
    """All paths that were looked up, and the drafter's by falling joint probability as far as the nodes go."""
    both: Paths = {path: drafted.get(path, -math.inf) for path in found}

    def joint(path: tuple[int, ...]) -> float:
        return sum(drafted[path[:end]] for end in range(1, len(path) + 1))

    for path in sorted((path for path in drafted if path not in both), key=lambda path: -joint(path)):
        if len(both) < num_nodes:
            both[path] = drafted[path]
    return both


@given(trees(), trees(most=4), st.integers(4, 12))
def test_what_was_looked_up_is_there_and_the_likeliest_of_the_others(
    drafted: Paths, found: Paths, num_nodes: int
) -> None:
    both = as_paths(*merged(as_tree(drafted), as_tree(found), num_nodes))
    assert both == merged_by_definition(drafted, found, num_nodes)


def chain_by_definition(text: list[int], length: int) -> list[tuple[int, ...]]:
    """Each prefix of the chain that goes on as the text did before, by the likeliest token at each step."""
    path: list[int] = []
    while len(path) < length and (following := search(text + path)):
        path.append(max(following, key=lambda token: following[token]))
    return [tuple(path[:end]) for end in range(1, len(path) + 1)]


SHAPES = [(4, 4, 4), (1, 1, 3), (1, 1, 1), (3, 2, 6), (2, 3, None)]


@pytest.mark.parametrize(
    ("name", "lookup"), [*((name, 2) for name in ("eagle3", "eagle", "dflash", "standalone", "ngram")), ("medusa", 1),
                         ("medusa", 2), ("medusa", 3)]
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
    policies = [DrafterPolicy(copy.deepcopy(drafter), engine.store, num_nodes=15, shape=TreeShape(1)) for _ in range(2)]
    td, merges = env.reset(), 0
    while env.num_active:
        drafts: dict[tuple, tuple[TensorDict, TensorDict]] = {}
        for depth, width, nodes in SHAPES:
            alone, shape = (TreeShape(depth, width, nodes, lookup=tokens) for tokens in (0, lookup))
            for policy, each in zip(policies, (alone, shape), strict=True):
                policy.shape = each
            drafts[depth, width, shape.num_nodes] = tuple(policy(td.clone())["draft"] for policy in policies)
        for slot in engine.store.occupied.tolist():
            text = engine.store.tokens[slot, : engine.store.lengths[slot]].tolist()
            for (_, _, nodes), pair in drafts.items():
                before, after = (
                    as_paths(
                        *(draft[key][slot][draft["mask"][slot]].tolist() for key in ("tokens", "parents", "log_probs"))
                    )
                    for draft in pair
                )
                chain = chain_by_definition(text, min(lookup, nodes)) if len(text) > 1 else []
                assert after == merged_by_definition(before, chain, nodes)
                merges += after != before
        _, td = env.step_and_maybe_reset(policies[1](td))
    assert merges > 20 or name == "ngram"  # whose own trees hold most of it


@pytest.mark.parametrize("depth", [1, 3])
def test_lookup_alone_needs_the_text_only(depth: int) -> None:
    target = tiny_target()
    drafter = get_drafter("medusa").from_target(TargetParts.of(target), draft_vocab=torch.arange(20)).double()
    engine = TransformersEngine(target, num_slots=2, max_length=20, feature_layers=drafter.feature_layers)
    queue = [Request(0, torch.tensor([25, 26, 27, 28, 25, 26]), NINE), Request(1, torch.tensor([1, 2, 3]), NINE)]
    env = SpecDecodeEnv(engine, lambda: queue.pop(0) if queue else None, num_nodes=4)
    policy = DrafterPolicy(
        drafter, engine.store, num_nodes=4, shape=TreeShape(depth, 1, depth, lookup=2, lookup_only=True)
    )
    env.reset()
    engine.store.tokens[0, :6], engine.store.lengths[0] = torch.tensor([25, 26, 27, 28, 25, 26]), 6
    draft = policy.draft(torch.ones(2, 1, dtype=torch.bool))
    assert draft["tokens"][0].tolist() == ([27, 28, 25] + [0])[:depth] + [0] * (4 - depth)
    assert draft["parents"][0].tolist() == [-1, 0, 1][:depth] + [-1] * (4 - depth)
    assert draft["log_probs"][0, :depth].tolist() == [-math.inf] * depth  # the drafter did not draw them
    assert policy.looked_up.tolist() == [True, True] and not policy.drafted.any()
    assert policy.drafter.cached.tolist() == [0, 0]

"""N-grams of the request against a search written as its definition, and the trees made of them."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_rl.policies import NgramDrafter, TreeShape
from aurora_rl.policies.lookup import continuations, ngram_tree

texts = st.lists(st.integers(0, 2), max_size=20)  # few tokens, so that runs come again


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
def test_the_tree_holds_the_likeliest_paths(text: list[int], depth: int, width: int, budget: int) -> None:
    tree = ngram_tree(text, TreeShape(depth, width, budget))
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
    assert len(set(paths)) == len(paths) == min(len(chance), TreeShape(depth, width, budget).budget)
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

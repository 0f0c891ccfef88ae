"""Prompt lookup against a search written as its definition, and chains merged into trees."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_rl.policies.lookup import Tree, lookup, merge_chain

texts = st.lists(st.integers(0, 2), max_size=20)  # few tokens, so that runs come again


def search(text: list[int], count: int) -> list[int]:
    """The definition: the longest run first, the latest place first."""
    for size in (4, 3, 2):
        for start in range(len(text) - size - 1, -1, -1):
            if size < len(text) and text[start : start + size] == text[len(text) - size :]:
                return text[start + size : start + size + count]
    return []


@given(texts, st.integers(1, 5))
def test_lookup_is_the_latest_longest_match(text: list[int], count: int) -> None:
    assert lookup(torch.tensor(text, dtype=torch.int64), count) == search(text, count)


def test_a_match_may_overlap_the_end() -> None:
    assert lookup(torch.tensor([1, 1, 1]), 2) == [1]
    assert lookup(torch.tensor([8, 5, 6, 5, 6, 5, 6]), 3) == [5, 6]


def test_one_token_alone_is_no_match() -> None:
    assert lookup(torch.tensor([3, 4, 3]), 2) == []


@st.composite
def trees(draw: st.DrawFn) -> dict[tuple[int, ...], float]:
    """Paths with their log-probabilities: up to eight nodes, siblings differ."""
    paths: dict[tuple[int, ...], float] = {}
    for _ in range(draw(st.integers(0, 8))):
        parent = draw(st.sampled_from([(), *paths]))
        paths.setdefault((*parent, draw(st.integers(0, 3))), draw(st.floats(-5, 0)))
    return paths


def as_tree(paths: dict[tuple[int, ...], float]) -> Tree:
    index = {path: i for i, path in enumerate(paths)}
    return Tree([p[-1] for p in paths], [index.get(p[:-1], -1) for p in paths], list(paths.values()))


def as_paths(tree: Tree) -> dict[tuple[int, ...], float]:
    paths: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
        assert -1 <= parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths)
    return dict(zip(paths, tree.log_probs, strict=True))


@given(trees(), st.lists(st.integers(0, 3), max_size=4), st.integers(4, 12))
def test_a_merged_chain_is_there_and_the_likeliest_of_the_others(
    paths: dict[tuple[int, ...], float], chain: list[int], budget: int
) -> None:
    merged = as_paths(merge_chain(as_tree(paths), chain, budget))
    needed = {tuple(chain[:end]) for end in range(1, len(chain) + 1)}
    assert needed <= merged.keys() and len(merged) == min(budget, len(needed | paths.keys()))
    for path, log_prob in merged.items():
        assert log_prob == paths.get(path, -math.inf)

    def joint(path: tuple[int, ...]) -> float:
        return sum(paths[path[:end]] for end in range(1, len(path) + 1))

    # No node that went was likelier than one that stayed, the chain's aside.
    went = [joint(path) for path in paths.keys() - merged.keys()]
    stayed = [joint(path) for path in merged.keys() - needed]
    assert not went or not stayed or max(went) <= min(stayed) + 1e-9

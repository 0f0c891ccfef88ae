"""Prompt lookup against a search written as its definition, and chains merged into trees."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_rl.policies.lookup import lookup, merge_chain

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


chains = st.lists(st.lists(st.integers(0, 3), max_size=4), max_size=6)


@given(chains)
def test_merged_chains_are_the_set_of_their_paths(given_chains: list[list[int]]) -> None:
    tokens: list[int] = []
    parents: list[int] = []
    for chain in given_chains:
        before = len(tokens)
        assert merge_chain(tokens, parents, chain) == len(tokens) - before
    paths: list[tuple[int, ...]] = []
    for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        assert -1 <= parent < node
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    expected = {tuple(chain[:end]) for chain in given_chains for end in range(1, len(chain) + 1)}
    assert len(set(paths)) == len(paths) and set(paths) == expected

"""Rows of finished requests: the longest kept beginning, the least recently used first out, apart by salt, bounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_rl.prefix_cache import PrefixCache

TEXTS = st.lists(
    st.tuples(st.booleans(), st.sampled_from([None, "a", "b"]), st.lists(st.integers(0, 1), max_size=6)), max_size=25
)


def rows(text: list[int]) -> torch.Tensor:
    """A row for each token, which says what it and all before it are."""
    return torch.tensor([[int("1" + "".join(map(str, text[: i + 1])), 2)] for i in range(len(text))]).reshape(-1, 1)


@given(calls=TEXTS, most=st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_whatever_is_saved_and_loaded(calls: list[tuple[bool, str | None, list[int]]], most: int) -> None:
    cache, kept = PrefixCache(most), []  # type: ignore[var-annotated]
    queries = hits = 0
    for save, salt, text in calls:
        tokens = torch.tensor(text, dtype=torch.int64)
        if save:
            cache.save(tokens, [torch.cat([rows(text), torch.full((2, 1), -7)])], salt)
            text = text[:most]
            there = [each for each in kept if each[0] == salt and each[1][: len(text)] == text]
            if there or not text:  # used just now
                found = there[-1:] if text else []
                kept = [each for each in kept if each not in found] + found
            else:
                kept = [each for each in kept if each[0] != salt or text[: len(each[1])] != each[1]]
                while sum(len(each) for _, each in kept) + len(text) > most:
                    kept.pop(0)
                kept.append((salt, text))
            assert cache.num_tokens == sum(len(each) for _, each in kept) <= most
        else:
            filled = torch.zeros(len(text) + 1, 1, dtype=torch.int64)
            pairs = [list(zip(each, text, strict=False)) if owner == salt else [] for owner, each in kept]
            common = [next((i for i, (a, b) in enumerate(pair) if a != b), len(pair)) for pair in pairs]
            longest = max(common, default=0)
            assert cache.load(tokens, [filled], salt) == longest
            assert torch.equal(filled[:longest], rows(text)[:longest]) and not filled[longest:].any()
            if longest:
                kept.append(kept.pop(max(i for i, count in enumerate(common) if count == longest)))
            queries, hits = queries + len(text), hits + longest
    assert (cache.queries, cache.hits) == (queries, hits)


def test_rows_are_copies() -> None:
    cache, source = PrefixCache(4), torch.tensor([1.0, 2.0])
    cache.save(torch.tensor([5, 6]), [source])
    source.zero_()
    first, second = torch.zeros(2), torch.zeros(2)
    assert cache.load(torch.tensor([5, 6]), [first]) == 2
    first.zero_()
    assert cache.load(torch.tensor([5, 6, 7]), [second]) == 2 and second.tolist() == [1.0, 2.0]


def test_a_text_that_begins_another_is_dropped_for_it() -> None:
    cache = PrefixCache(8)
    cache.save(torch.tensor([1, 2, 3]), [])
    cache.save(torch.tensor([1, 2, 3, 4, 5]), [])
    assert cache.num_tokens == 5
    cache.clear()
    assert cache.num_tokens == 0 and cache.load(torch.tensor([1]), []) == 0


def test_a_bound_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0; leave the cache out"):
        PrefixCache(0)


def test_a_tenants_rows_are_deleted_and_leave_room() -> None:
    cache, rows = PrefixCache(max_tokens=10), torch.arange(4.0)
    for first, salt in ((1, "a@x"), (1, "b@"), (1, None)):
        cache.save(torch.tensor([first, 2, 3]), [rows], salt)
    assert (cache.delete("a"), cache.delete("a"), cache.num_tokens) == (1, 0, 6)
    text = torch.tensor([1, 2, 3])
    assert [cache.load(text, [torch.zeros(4)], salt) for salt in ("a@x", "b@", None)] == [0, 3, 3]
    cache.save(torch.tensor([5, 6, 7]), [rows], "a@")
    assert cache.num_tokens == 9

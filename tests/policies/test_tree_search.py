"""Search for trees, drawn chains, and cutting to a number of nodes: literal numbers and brute force."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_rl.policies import TreeShape
from aurora_rl.policies.tree_search import SampledSearch, TopKSearch, best_first


def test_best_first_keeps_the_likeliest_and_renames_parents() -> None:
    # Nodes: a(-0.1) b(-2) a.c(-0.3) a.d(-3) b.e(-2.5); the best three are a, a.c and b.
    kept = best_first(
        torch.tensor([[10, 11, 12, 13, 14]]),
        torch.tensor([[-1, -1, 0, 0, 1]]),
        torch.tensor([[-0.1, -2.0, -0.2, -2.9, -0.5]]),
        torch.tensor([[-0.1, -2.0, -0.3, -3.0, -2.5]]),
        num_nodes=3,
    )
    assert kept.tokens.tolist() == [[10, 11, 12]]
    assert kept.parents.tolist() == [[-1, -1, 0]]
    torch.testing.assert_close(kept.log_probs, torch.tensor([[-0.1, -2.0, -0.2]]))
    # With room for four it is b.e, whose parent keeps its place.
    four = best_first(
        torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[-1, -1, 0, 0, 1]]), torch.zeros(1, 5),
        torch.tensor([[-0.1, -2.0, -0.3, -3.0, -2.5]]), num_nodes=4,
    )  # fmt: skip
    assert four.tokens.tolist() == [[10, 11, 12, 14]] and four.parents.tolist() == [[-1, -1, 0, 1]]


def test_best_first_on_ties_keeps_a_parent_before_its_child() -> None:
    # Certain children: joint probabilities equal their parents'.
    kept = best_first(
        torch.tensor([[1, 2, 3, 4]]), torch.tensor([[-1, 0, 1, 2]]), torch.zeros(1, 4), torch.zeros(1, 4), num_nodes=2
    )
    assert kept.tokens.tolist() == [[1, 2]] and kept.parents.tolist() == [[-1, 0]]


@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 12), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_search_equals_a_beam_search_by_hand(depth: int, width: int, extra: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    vocab = torch.tensor([7, 3, 9])
    levels = torch.randn(2, depth, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    shape = TreeShape(depth, width, depth + extra)
    search = TopKSearch(vocab, shape)
    search.add(levels[:, :1])
    for level in range(1, depth):
        tokens, _ = search.frontier()
        search.add(levels[:, level : level + 1].expand(-1, tokens.shape[1], -1))
    tokens, parents, log_probs, *_ = search.proposal()

    for row in range(2):
        nodes: dict[tuple[int, ...], float] = {}
        frontier: dict[tuple[int, ...], float] = {(): 0.0}
        for level in range(depth):
            order = levels[row, level].sort(descending=True)
            best = list(zip(vocab[order.indices].tolist(), order.values.tolist(), strict=True))[:width]
            children = {(*p, t): j + q for (p, j), (t, q) in itertools.product(frontier.items(), best)}
            nodes |= children
            frontier = dict(sorted(children.items(), key=lambda item: -item[1])[:width])
        expected = set(sorted(nodes, key=lambda path: -nodes[path])[: shape.num_nodes])
        paths: list[tuple[int, ...]] = []
        for token, parent in zip(tokens[row].tolist(), parents[row].tolist(), strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), token))
        assert set(paths) == expected
        for path, log_prob in zip(paths, log_probs[row].tolist(), strict=True):
            assert log_prob == pytest.approx(
                levels[row, len(path) - 1, vocab.tolist().index(path[-1])].item(), abs=1e-6
            )


@pytest.mark.parametrize("mode", ["sampled", "sampled_without_replacement"])
def test_sampled_chains_have_the_drafters_law(mode: str) -> None:
    """Two chains of two, 20 000 times: the law of all four tokens, and what is recorded with them."""
    count, vocab = 20_000, torch.tensor([7, 3, 9])
    first = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    second = torch.tensor([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1], [0.3, 0.3, 0.4]], dtype=torch.float64)  # by the first
    search = SampledSearch(vocab, TreeShape(2, 2, mode=mode), torch.Generator().manual_seed(0))
    search.add(first.log().expand(count, 1, 3))
    tokens, above = search.frontier()
    assert above.unique().tolist() == [0]
    drawn = (tokens[:, :, None] == vocab).int().argmax(-1)
    search.add(second[drawn].log())
    tokens, parents, log_probs, q, _ = search.proposal()
    assert parents.unique(dim=0).tolist() == [[-1, -1, 0, 1]]
    drawn = (tokens[:, :, None] == vocab).int().argmax(-1)
    assert q is not None
    torch.testing.assert_close(log_probs.double(), q.gather(-1, drawn[:, :, None])[:, :, 0].log(), atol=1e-6, rtol=0)
    torch.testing.assert_close(q[:, 2], second[drawn[:, 0]])
    pair = first[:, None] * first
    if mode != "sampled":
        pair = (first[:, None] * (first / (1 - first)[:, None])).fill_diagonal_(0)
    law = torch.einsum("ab,ac,bd->abcd", pair, second, second).flatten()
    counts = torch.zeros(81).index_add_(0, drawn @ torch.tensor([27, 9, 3, 1]), torch.ones(count)).double()
    assert counts[law == 0].sum() == 0
    chi = ((counts - count * law) ** 2 / (count * law))[law > 0].sum()
    assert chi < 130  # at most 80 degrees of freedom, one in 10 000


def test_first_tokens_that_cannot_differ() -> None:
    search = SampledSearch(torch.tensor([1, 2]), TreeShape(1, 2, mode="sampled_without_replacement"))
    with pytest.raises(ValueError, match="2 first tokens cannot all differ"):
        search.add(torch.tensor([[[0.0, -torch.inf]]]))

"""Tree shapes, search for trees, cutting to a budget, and checks of weights: literal numbers and brute force."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from aurora_rl.policies import TreeShape
from aurora_rl.policies.drafter import check_weights, draft_rows
from aurora_rl.policies.tree_search import SampledSearch, TopKSearch, best_first
from aurora_rl.tree_index import TreeIndex


@pytest.mark.parametrize(
    ("shape", "budget"),
    [
        (TreeShape(0), 0),
        (TreeShape(0, 4), 0),
        (TreeShape(3), 3),
        (TreeShape(1, 4), 4),
        (TreeShape(2, 3), 3 + 9),
        (TreeShape(3, 3), 3 + 9 + 9),
        (TreeShape(3, 3, 8), 8),
        (TreeShape(2, 2, 100), 6),
        (TreeShape(2, 2, 100, mode="sampled"), 4),
        (TreeShape(2, 2, 7, lookup=3), 7),  # what is looked up shares the budget
        (TreeShape(2, 2, 100, lookup=3), 9),
        (TreeShape(2, 2, None, lookup=3), 6),
        (TreeShape(0, 2, 4, lookup=3), 0),
    ],
)
def test_budget(shape: TreeShape, budget: int) -> None:
    assert shape.num_nodes == budget
    assert replace(shape) == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "depth >= 0 and width >= 1, got depth -1, width 1"),
        ((2, 0), "depth >= 0 and width >= 1, got depth 2, width 0"),
        ((4, 2, 3), "num_nodes=3 cannot hold one path of depth 4"),
        ((1, 2, 3, "topp"), "mode must be one of topk, sampled, sampled_without_replacement, got 'topp'"),
    ],
)
def test_bad_shapes_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape(*arguments)


def test_best_first_keeps_the_likeliest_and_renames_parents() -> None:
    # Nodes: a(-0.1) b(-2) a.c(-0.3) a.d(-3) b.e(-2.5); the best three are a, a.c and b.
    kept = best_first(
        torch.tensor([[10, 11, 12, 13, 14]]),
        torch.tensor([[-1, -1, 0, 0, 1]]),
        torch.tensor([[-0.1, -2.0, -0.2, -2.9, -0.5]]),
        torch.tensor([[-0.1, -2.0, -0.3, -3.0, -2.5]]),
        budget=3,
    )
    assert kept.tokens.tolist() == [[10, 11, 12]]
    assert kept.parents.tolist() == [[-1, -1, 0]]
    torch.testing.assert_close(kept.log_probs, torch.tensor([[-0.1, -2.0, -0.2]]))
    # With room for four it is b.e, whose parent keeps its place.
    four = best_first(
        torch.tensor([[10, 11, 12, 13, 14]]), torch.tensor([[-1, -1, 0, 0, 1]]), torch.zeros(1, 5),
        torch.tensor([[-0.1, -2.0, -0.3, -3.0, -2.5]]), budget=4,
    )  # fmt: skip
    assert four.tokens.tolist() == [[10, 11, 12, 14]] and four.parents.tolist() == [[-1, -1, 0, 1]]


def test_best_first_on_ties_keeps_a_parent_before_its_child() -> None:
    # Certain children: joint probabilities equal their parents'.
    kept = best_first(
        torch.tensor([[1, 2, 3, 4]]), torch.tensor([[-1, 0, 1, 2]]), torch.zeros(1, 4), torch.zeros(1, 4), budget=2
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


def test_sampled_shapes_hold_whole_chains() -> None:
    assert [TreeShape(d, 4, n, mode="sampled").chains for d, n in ((0, 4), (1, 4), (2, 4), (3, 4), (2, None))] == [
        0, 4, 2, 1, 4,
    ]  # fmt: skip


def test_a_shallower_sampled_tree_may_have_more_nodes() -> None:
    """Depth control moves within what was allocated for the deepest tree."""
    for nodes, budgets in ((7, [0, 4, 6, 6, 4]), (None, [0, 4, 8, 12, 16])):
        most = TreeShape(4, 4, nodes, mode="sampled")
        shapes = [TreeShape(depth, 4, nodes, mode="sampled") for depth in range(5)]
        assert [shape.depth * shape.chains for shape in shapes] == budgets and most.num_nodes >= max(budgets)
        assert [replace(most, depth=depth).chains for depth in range(5)] == [shape.chains for shape in shapes]


def test_first_tokens_that_cannot_differ() -> None:
    search = SampledSearch(torch.tensor([1, 2]), TreeShape(1, 2, mode="sampled_without_replacement"))
    with pytest.raises(ValueError, match="2 first tokens cannot all differ"):
        search.add(torch.tensor([[[0.0, -torch.inf]]]))


def test_draft_rows() -> None:
    assert draft_rows(torch.tensor([9, 2, 5]), torch.tensor([[2, 9, 4], [0, 5, 31]])).tolist() == [
        [1, 0, -1],
        [-1, 2, -1],
    ]


def test_recorded_trees() -> None:
    """Two requests: one of three rounds, of which the second drafted nothing, and one whose root is its first token."""
    batch = TensorDict({
        "rounds": {
            "offset": torch.tensor([0, 3, 3, 5, 6]), "anchor": torch.tensor([4, 5, 7, 0]),
            "request_offset": torch.tensor([0, 3, 4]),
        },
        "nodes": {"parents": torch.tensor([-1, 0, 0, -1, 0, -1])},
    })  # fmt: skip
    trees = TreeIndex.of(batch)
    assert trees.num_rounds == 4
    assert trees.request.tolist() == [0, 0, 0, 1] + [0, 0, 0, 0, 0, 1]
    assert trees.root.tolist() == [3, 4, 6, -1] + [3, 3, 3, 6, 6, -1]
    assert trees.depth.tolist() == [0, 0, 0, 0] + [1, 2, 2, 1, 2, 1]
    assert trees.parent.tolist() == [0, 4, 4, 2, 7, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"tensor 'a' \(2,\) is missing"),
        ({"a": torch.zeros(2)}, r"tensor 'b' \(1, 3\) is missing"),
        ({"a": torch.zeros(3), "b": torch.zeros(1, 3)}, r"tensor 'a' has shape \(3,\), this drafter needs \(2,\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(1, 3), "c": torch.zeros(1)}, "tensor 'c' is unknown to this drafter"),
    ],
)
def test_check_weights_names_the_first_difference(given: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights({"a": torch.zeros(2), "b": torch.zeros(1, 3)}, given)

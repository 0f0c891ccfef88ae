"""`aurora_kernels.trees` against plain Python over lists, and against answers derived by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aurora_kernels.trees import (
    accepted_path,
    ancestor_mask,
    depths,
    last_accepted,
    reorder_depth_first,
    repeated_siblings,
    sibling_ranks,
    valid_nodes,
    walk,
)

VOCAB = 4
MANY = settings(max_examples=60, deadline=None)

# ---------------------------------------------------------------------------------------------------------------------
# Slow references: one tree, lists
# ---------------------------------------------------------------------------------------------------------------------


def path_to_root(parents: list[int], node: int) -> list[int]:
    """The node, its parent, ..., without the root."""
    path: list[int] = []
    while node != -1:
        path.append(node)
        node = parents[node]
    return path


def slow_valid(
    tokens: list[int], parents: list[int], mask: list[bool], vocab_size: int, repeats: bool = False
) -> list[bool]:
    valid: list[bool] = []
    taken: set[tuple[int, int]] = set()
    for node, (token, parent, masked_in) in enumerate(zip(tokens, parents, mask, strict=True)):
        legal = masked_in and 0 <= token < vocab_size and -1 <= parent < node
        legal = legal and (parent == -1 or valid[parent]) and (repeats or (parent, token) not in taken)
        valid.append(legal)
        if legal:
            taken.add((parent, token))
    return valid


def slow_path(tokens: list[int], parents: list[int], valid: list[bool], choices: list[int]) -> list[int]:
    """Descend from the root, one chosen child at a time."""
    path: list[int] = []
    here = -1
    while True:
        chosen = choices[here + 1]
        children = [n for n in range(len(tokens)) if valid[n] and parents[n] == here and tokens[n] == chosen]
        if not children:
            return path
        here = children[0]
        path.append(here)


def slow_depth_first(parents: list[int], here: int = -1) -> list[int]:
    order = []
    for node, parent in enumerate(parents):
        if parent == here:
            order += [node, *slow_depth_first(parents, node)]
    return order


# ---------------------------------------------------------------------------------------------------------------------
# Strategies
# ---------------------------------------------------------------------------------------------------------------------


@st.composite
def legal_parents(draw: st.DrawFn, max_nodes: int = 9) -> list[list[int]]:
    """A batch of topological parent lists of one length, which may be zero."""
    num_nodes = draw(st.integers(0, max_nodes))
    # A bias to recent parents, or deep trees would hardly ever be drawn.
    parent = [st.one_of(st.integers(-1, i - 1), st.just(i - 1)) for i in range(num_nodes)]
    return draw(st.lists(st.tuples(*parent).map(list), min_size=1, max_size=3))


@st.composite
def rounds(draw: st.DrawFn, lowest: int, highest: int, legal: bool) -> tuple[list, list, list, list]:
    """Tokens in `lowest .. highest`, parents (any number unless `legal`), masks and choices of a batch of trees."""
    parents = draw(legal_parents())
    shape = [len(each) for each in parents]
    if not legal:
        wild = st.integers(-3, 10)
        parents = [[draw(st.one_of(st.just(p), st.just(p), wild)) for p in each] for each in parents]
    tokens = [draw(st.lists(st.integers(lowest, highest), min_size=n, max_size=n)) for n in shape]
    mask = [draw(st.lists(st.sampled_from([True, True, True, False]), min_size=n, max_size=n)) for n in shape]
    choices = [draw(st.lists(st.integers(0, 1), min_size=n + 1, max_size=n + 1)) for n in shape]
    return tokens, parents, mask, choices


def ints(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64)


def bools(rows: list[list[bool]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)


# ---------------------------------------------------------------------------------------------------------------------
# Properties
# ---------------------------------------------------------------------------------------------------------------------


@MANY
@given(legal_parents())
def test_depths_count_the_steps_to_the_root(parents: list[list[int]]) -> None:
    expected = [[len(path_to_root(each, node)) for node in range(len(each))] for each in parents]
    assert torch.equal(depths(ints(parents)), ints(expected))


@MANY
@given(rounds(-2, VOCAB + 1, legal=False))
def test_valid_nodes_projects_arbitrary_nodes_as_the_reference_does(batch: tuple) -> None:
    tokens, parents, mask, _ = batch
    for repeats in (False, True):
        expected = [slow_valid(*each, VOCAB, repeats) for each in zip(tokens, parents, mask, strict=True)]
        got = valid_nodes(ints(tokens), ints(parents), bools(mask), VOCAB, repeats=repeats)
        assert torch.equal(got, bools(expected))


@MANY
@given(rounds(-2, VOCAB + 1, legal=False))
def test_arbitrary_parents_never_index_out_of_bounds(batch: tuple) -> None:
    tokens, parents, mask, choices = batch
    valid = [slow_valid(*each, VOCAB) for each in zip(tokens, parents, mask, strict=True)]
    accepted = walk(ints(tokens), ints(parents), bools(valid), ints(choices))
    expected = [slow_path(*each) for each in zip(tokens, parents, valid, choices, strict=True)]
    assert [row.nonzero()[:, 0].tolist() for row in accepted] == expected
    deep = depths(ints(parents))
    attend = ancestor_mask(ints(parents), bools(valid))
    for b, row in enumerate(valid):
        for node in range(len(row)):
            if row[node]:
                path = path_to_root(parents[b], node)
                assert deep[b, node] == len(path)
                assert attend[b, node + 1].nonzero()[:, 0].tolist() == sorted([0, *(n + 1 for n in path)])


@MANY
@given(rounds(0, 1, legal=True))
def test_ancestor_mask_holds_self_and_ancestors(batch: tuple) -> None:
    _, parents, valid, _ = batch
    # Validity that is not closed under ancestors is legal input here; a child of an invalid node just does not see it.
    expected = []
    for tree, real in zip(parents, valid, strict=True):
        columns = len(tree) + 1
        seen = [[row == column for column in range(columns)] for row in range(columns)]
        for node in range(len(tree)):
            if real[node]:
                for ancestor in path_to_root(tree, node):
                    seen[node + 1][ancestor + 1] |= real[ancestor]
                seen[node + 1][0] = True
        expected.append(seen)
    assert ancestor_mask(ints(parents), bools(valid)).tolist() == expected


@MANY
@given(rounds(0, 1, legal=True), st.booleans())
def test_walk_and_paths_follow_the_choices(batch: tuple, repeats: bool) -> None:
    tokens, parents, mask, choices = batch
    valid = [slow_valid(*each, VOCAB, repeats) for each in zip(tokens, parents, mask, strict=True)]
    expected = [slow_path(*each) for each in zip(tokens, parents, valid, choices, strict=True)]
    accepted = walk(ints(tokens), ints(parents), bools(valid), ints(choices))
    path, length = accepted_path(accepted)
    assert length.tolist() == [len(each) for each in expected]
    assert path.tolist() == [each + [-1] * (len(tokens[0]) - len(each)) for each in expected]
    assert last_accepted(accepted).tolist() == [each[-1] + 1 if each else 0 for each in expected]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12))
def test_ranks_and_repeats_among_siblings(nodes: list[tuple[int, int]]) -> None:
    context, tokens = (torch.tensor([n[i] for n in nodes], dtype=torch.int64) for i in (0, 1))
    before = [nodes[:i] for i in range(len(nodes))]
    ranks = [sum(c == node[0] for c, _ in seen) for node, seen in zip(nodes, before, strict=True)]
    assert sibling_ranks(context).tolist() == ranks
    repeated = [node in seen for node, seen in zip(nodes, before, strict=True)]
    assert repeated_siblings(context, tokens).tolist() == repeated


@MANY
@given(legal_parents())
def test_depth_first_order(parents: list[list[int]]) -> None:
    for tree in parents:
        order, renamed = reorder_depth_first(torch.tensor(tree, dtype=torch.int64))
        assert order.tolist() == slow_depth_first(tree)
        # The parent by its old name, of every node in the new order.
        assert [order[p].item() if p >= 0 else -1 for p in renamed] == [tree[node] for node in order]
        assert renamed.dtype == order.dtype == torch.int64
        # A tree in depth-first order is left as it is.
        assert reorder_depth_first(renamed)[0].tolist() == list(range(len(tree)))


# ---------------------------------------------------------------------------------------------------------------------
# Answers by hand
# ---------------------------------------------------------------------------------------------------------------------

#         root
#        /    \
#      0:a    1:b
#     /   \      \
#   2:b   3:c    4:a
#    |
#   5:a
PARENTS = torch.tensor([[-1, -1, 0, 0, 1, 2]])
TOKENS = torch.tensor([[0, 1, 1, 2, 0, 0]])
ALL = torch.ones(1, 6, dtype=torch.bool)


def test_literal_depths_and_mask() -> None:
    assert depths(PARENTS).tolist() == [[1, 1, 2, 2, 2, 3]]
    expected = """
        1000000
        1100000
        1010000
        1101000
        1100100
        1010010
        1101001
    """
    assert ancestor_mask(PARENTS, ALL).int().tolist() == [[[int(c) for c in row] for row in expected.split()]]


@pytest.mark.parametrize(
    ("choices", "accepted", "column"),
    [
        # root says a, node 0 says b, node 2 says a: the left sequence; the bonus is chosen at node 5, column 6
        ([0, 1, 9, 0, 9, 9, 7], [1, 0, 1, 0, 0, 1], 6),
        # root says b, but node 1 says c, which it has no child for
        ([1, 1, 2, 0, 9, 9, 7], [0, 1, 0, 0, 0, 0], 2),
        # root says c: nothing, although nodes 0 and 2 agree with their children
        ([2, 1, 0, 0, 9, 9, 7], [0, 0, 0, 0, 0, 0], 0),
    ],
)
def test_literal_walks(choices: list[int], accepted: list[int], column: int) -> None:
    got = walk(TOKENS, PARENTS, ALL, torch.tensor([choices]))
    assert got.int().tolist() == [accepted]
    assert last_accepted(got).tolist() == [column]


@pytest.mark.parametrize(
    ("why", "change", "expected"),
    [
        ("as it is", {}, [1, 1, 1, 1, 1, 1]),
        ("a masked node takes its subtree along", {"mask": (2, False)}, [1, 1, 0, 1, 1, 0]),
        ("a token beyond the vocabulary", {"tokens": (1, 3)}, [1, 0, 1, 1, 0, 1]),
        ("a negative token", {"tokens": (5, -1)}, [1, 1, 1, 1, 1, 0]),
        ("its own parent", {"parents": (0, 0)}, [0, 1, 0, 0, 1, 0]),
        ("a later node as parent", {"parents": (2, 3)}, [1, 1, 0, 1, 1, 0]),
        ("a parent below -1", {"parents": (4, -2)}, [1, 1, 1, 1, 0, 1]),
        ("a repeated sibling and its child", {"tokens": (1, 0)}, [1, 0, 1, 1, 0, 1]),
    ],
)
def test_literal_validity(why: str, change: dict[str, tuple[int, int]], expected: list[int]) -> None:
    nodes = {"tokens": TOKENS.clone(), "parents": PARENTS.clone(), "mask": ALL.clone()}
    for name, (node, value) in change.items():
        nodes[name][0, node] = value
    assert valid_nodes(**nodes, vocab_size=3).int().tolist() == [expected], why


def test_a_repeat_of_a_dropped_sibling_survives() -> None:
    tokens, parents = torch.tensor([[1, 1, 1]]), torch.full((1, 3), -1)
    mask = torch.tensor([[False, True, True]])
    assert valid_nodes(tokens, parents, mask, vocab_size=3).tolist() == [[False, True, False]]


def test_literal_depth_first() -> None:
    order, parents = reorder_depth_first(PARENTS[0])
    assert order.tolist() == [0, 2, 5, 3, 1, 4]
    assert parents.tolist() == [-1, 0, 1, 0, -1, 4]


@pytest.mark.parametrize("parents", [[0], [-2], [-1, 2, 0]])
def test_depth_first_names_the_illegal_node(parents: list[int]) -> None:
    with pytest.raises(ValueError, match=r"node \d has parent -?\d, expected -1 or an earlier node; drop invalid"):
        reorder_depth_first(torch.tensor(parents))

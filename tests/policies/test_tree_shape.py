"""Tree shapes: literal numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from aurora_rl.policies import TreeShape


@pytest.mark.parametrize(
    ("shape", "num_nodes"),
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
        (TreeShape(2, 2, 7, lookup=3), 7),  # lookup nodes count among them
        (TreeShape(2, 2, 100, lookup=3), 9),
        (TreeShape(2, 2, None, lookup=3), 6),
        (TreeShape(0, 2, 4, lookup=3), 0),
    ],
)
def test_a_shape_says_its_number_of_nodes(shape: TreeShape, num_nodes: int) -> None:
    assert shape.num_nodes == num_nodes
    assert replace(shape) == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1,), "depth >= 0 and width >= 1, got depth -1, width 1"),
        ((2, 0), "depth >= 0 and width >= 1, got depth 2, width 0"),
        ((4, 2, 3), "num_nodes=3 cannot hold one path of depth 4"),
        ((1, 2, 3, "topp"), "mode must be one of topk, sampled, sampled_without_replacement, got 'topp'"),
        ((1, 2, 3, "topk", -1), "lookup must be at least 0, got -1"),
        ((1, 2, 3, "topk", 0, True), "lookup must be at least 1, got 0"),
        ((1, 2, 3, "sampled", 2), "lookup=2 adds nodes that the drafter did not draw; set it to 0 in mode 'sampled'"),
    ],
)
def test_bad_shapes_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TreeShape(*arguments)


def test_sampled_shapes_hold_whole_chains() -> None:
    assert [TreeShape(d, 4, n, mode="sampled").num_chains for d, n in ((0, 4), (1, 4), (2, 4), (3, 4), (2, None))] == [
        0, 4, 2, 1, 4,
    ]  # fmt: skip


def test_a_shallower_sampled_tree_may_have_more_nodes() -> None:
    """The tree controller chooses depths within what was allocated for the deepest tree."""
    for nodes, drafted in ((7, [0, 4, 6, 6, 4]), (None, [0, 4, 8, 12, 16])):
        most = TreeShape(4, 4, nodes, mode="sampled")
        shapes = [TreeShape(depth, 4, nodes, mode="sampled") for depth in range(5)]
        assert [shape.depth * shape.num_chains for shape in shapes] == drafted and most.num_nodes >= max(drafted)
        assert [replace(most, depth=depth).num_chains for depth in range(5)] == [shape.num_chains for shape in shapes]


@pytest.mark.parametrize(("count", "depth", "width"), [(1, 1, 1), (2, 2, 2), (4, 4, 4), (8, 6, 4), (20, 6, 4)])
def test_lookup_alone_has_a_shape_of_its_own(count: int, depth: int, width: int) -> None:
    alone = TreeShape(3, 2, 5, lookup=8).without_drafter(count)
    assert (alone.depth, alone.width, alone.num_nodes) == (depth, width, count)
    assert alone.lookup_only and alone.lookup == 8


def test_most_nodes_are_those_of_the_tree_or_of_lookup() -> None:
    assert [TreeShape(2, 2, n, lookup=m).max_nodes for n, m in ((4, 8), (6, 2), (5, 0))] == [8, 6, 5]

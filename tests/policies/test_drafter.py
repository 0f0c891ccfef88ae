"""Tree shapes and checks of weights: literal numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from aurora_rl.policies import Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.policies.drafter import check_weights, draft_rows
from aurora_rl.testing import tiny_target


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


def test_rows_of_tokens_in_the_draft_head() -> None:
    assert draft_rows(torch.tensor([9, 2, 5]), torch.tensor([[2, 9, 4], [0, 5, 31]])).tolist() == [
        [1, 0, -1],
        [-1, 2, -1],
    ]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, r"tensor 'a' \(2,\) is missing"),
        ({"a": torch.zeros(2)}, r"tensor 'b' \(1, 3\) is missing"),
        ({"a": torch.zeros(3), "b": torch.zeros(1, 3)}, r"tensor 'a' has shape \(3,\), this drafter needs \(2,\)"),
        ({"a": torch.zeros(2), "b": torch.zeros(1, 3), "c": torch.zeros(1)}, "tensor 'c' is unknown to this drafter"),
    ],
)
def test_check_weights_names_the_first_difference(weights: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_weights({"a": torch.zeros(2), "b": torch.zeros(1, 3)}, weights)


def test_a_serving_copy_leaves_the_drafter_in_training() -> None:
    target = tiny_target()
    drafter = Eagle3Drafter.from_target(TargetParts.of(target), draft_vocab=torch.arange(16)).float().train()
    served = drafter.serving_copy(torch.bfloat16)
    assert not served.training and all(p.dtype == torch.bfloat16 and not p.requires_grad for p in served.parameters())
    assert drafter.training and all(p.dtype == torch.float32 for p in drafter.parameters())
    assert any(p.requires_grad for p in drafter.parameters())
    assert {p.data_ptr() for p in served.parameters()}.isdisjoint(p.data_ptr() for p in drafter.parameters())

"""Masks of trees: dense and added to scores, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aurora_kernels import TreeMask

PREFIX = torch.tensor([0, 3])


def test_queries_see_the_text_and_what_they_see_of_the_tree() -> None:
    seen = torch.tensor([[[True, False]], [[False, True]]])
    assert TreeMask(PREFIX, seen).dense(1, 5).int().tolist() == [[[1, 0, 0, 0, 0]], [[1, 1, 1, 0, 1]]]


def test_a_chunk_sees_itself_causally() -> None:
    assert TreeMask(PREFIX).dense(2, 5).int().tolist() == [
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]],
        [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    ]


def test_a_window_bounds_the_text_and_not_the_tree() -> None:
    mask = TreeMask(PREFIX[1:], first=torch.tensor([[1, 4]]))
    assert mask.dense(2, 5).int().tolist() == [[[0, 1, 1, 1, 0], [0, 0, 0, 1, 1]]]


def test_no_tree_is_the_text_alone() -> None:
    assert TreeMask(PREFIX, torch.ones(2, 1, 0).bool()).dense(1, 4).int().tolist() == [[[0] * 4], [[1, 1, 1, 0]]]


def test_a_bias_repeats_rows_for_each_head_of_a_group_and_is_kept() -> None:
    mask = TreeMask(PREFIX)
    bias = mask.bias(3, 2, 5, torch.float32)
    assert torch.equal(bias, torch.where(mask.dense(2, 5), 0.0, -torch.inf).repeat(1, 3, 1)[:, None])
    assert mask.bias(3, 2, 5, torch.float32) is bias
    assert mask.bias(3, 2, 5, torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("prefix", "seen", "first", "message"),
    [
        (PREFIX[None].T, None, None, r"prefix must be \[b\], got \[2, 1\]"),
        (PREFIX, torch.ones(1, 2, 2).bool(), None, r"seen must be \[b, T, W\] bool with b = 2, got \[1, 2, 2\]"),
        (PREFIX, torch.zeros(2, 2, 2), None, "seen must be .* got .* torch.float32"),
        (PREFIX, None, PREFIX, r"first must be \[b, T\] with b = 2, got \[2\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    prefix: Tensor, seen: Tensor | None, first: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TreeMask(prefix, seen, first)


def test_words_hold_a_bit_for_each_key_of_the_tree() -> None:
    seen = torch.rand(2, 3, 130) < 0.5
    seen[0, 0] = True
    words = TreeMask(PREFIX, seen).words
    assert words.shape == (2, 3, 3) and words[0, 0, 0] == -1  # 64 bits
    key = torch.arange(130)
    assert torch.equal(((words[:, :, key // 64] >> key % 64) & 1).bool(), seen)
    with pytest.raises(ValueError, match="without seen is causal and has no bits"):
        TreeMask(PREFIX).words  # noqa: B018


@pytest.mark.parametrize("first", [None, torch.tensor([[0, 0], [3, 7]]), torch.tensor([[2, 0], [30, 1]])])
@pytest.mark.parametrize("seen", [None, torch.tensor([[[True, False], [True, True]]] * 2)])
def test_both_parts_together_are_the_whole(seen: Tensor | None, first: Tensor | None) -> None:
    mask = TreeMask(torch.tensor([2, 9]), seen, first)
    parts = mask.parts(1, 2, 11, torch.float32)
    whole = torch.zeros(2, 2, 11, dtype=torch.bool)
    if parts.text.stop > parts.text.start:
        text = parts.text_bias if parts.text_bias is not None else torch.zeros(1, 1, 1, 1)
        whole[:, :, parts.text] = text[:, 0].expand(2, 2, parts.text.stop - parts.text.start) == 0
    for slot, row in ((slot, row) for slot in range(2) for row in range(2)):
        columns = parts.own[slot][parts.own_bias[slot, 0, row] == 0]
        assert not bool(whole[slot, row, columns].any()) and len(columns.unique()) == len(columns), "seen twice"
        whole[slot, row, columns] = True
    assert torch.equal(whole, mask.dense(2, 11))

"""What the kernel alone does: ranges of columns and blocks of rows; test_tree_attention.py has the rest."""

from __future__ import annotations

import pytest
import torch
from attention_problems import assert_same, kernel, problem, reference

from aurora_kernels import TreeMask


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_ranges_of_columns_add_up(splits: int) -> None:
    query, key, value, mask = problem([260, 3, 126], 5)
    first = torch.tensor([200, 0, 120])[:, None].repeat(1, 6)
    for each in (mask, TreeMask(mask.prefix), TreeMask(mask.prefix, mask.seen, first)):
        sinks = torch.randn(4)
        out = kernel(query, key, value, each, splits=splits, sinks=sinks)
        assert_same(out, reference(query, key, value, each, sinks=sinks))


def test_more_rows_than_a_block() -> None:
    query, key, value, mask = problem([30], 64, heads=6, groups=2)
    assert_same(kernel(query, key, value, mask), reference(query, key, value, mask))

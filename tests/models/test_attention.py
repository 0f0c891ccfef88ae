"""Attention as transformers calls it: to slots' texts and trees, under a dense mask, and without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aurora_kernels import TreeMask
from aurora_rl.models.attention import PassMask, TextAndTrees, grouped_attention


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_a_pass_mask_a_dense_mask_and_none_are_the_same_attention() -> None:
    query, key, value = normal(2, 4, 3, 8), normal(2, 2, 9, 8), normal(2, 2, 9, 8)
    mask = TreeMask(torch.tensor([6, 6]))
    expected, _ = grouped_attention(nn.Module(), query, key, value, mask.dense(3, 9)[:, None])
    for form in (PassMask.of(mask, query[:, 0, :, 0]), None):
        torch.testing.assert_close(grouped_attention(nn.Module(), query, key, value, form)[0], expected)


def test_a_pass_mask_that_a_model_cut_is_refused() -> None:
    query, key = normal(1, 2, 3, 8), normal(1, 2, 9, 8)
    mask = PassMask.of(TreeMask(torch.tensor([6])), query[:, 0, :, 0])
    with pytest.raises(AttributeError, match="seen"):
        grouped_attention(nn.Module(), query, key, key, mask[:, :, :2])


def test_terms_that_it_does_not_know_are_refused() -> None:
    query, key = normal(1, 2, 3, 8), normal(1, 2, 9, 8)
    grouped_attention(nn.Module(), query, key, key, None, position_ids=torch.arange(3)[None], dropout=0.0)
    fix = r"does not know: position_bias; .*set_attn_implementation\('sdpa'\)"
    with pytest.raises(TypeError, match=fix):
        grouped_attention(nn.Module(), query, key, key, None, position_bias=normal(1, 2, 3, 9))


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 1), (3, 3)])
def test_grouped_attention_is_attention_head_by_head(heads: int, groups: int) -> None:
    b, length, columns, d = 2, 5, 9, 4
    query = torch.randn(b, heads, length, d, dtype=torch.float64)
    key, value = (torch.randn(b, groups, columns, d, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(b, length, columns) < 0.4
    mask[:, :, 0] = True  # no query without keys
    out, weights = grouped_attention(nn.Module(), query, key, value, mask[:, None], scaling=0.3)
    assert weights is None and out.shape == (b, length, heads, d)
    for i in range(b):
        for head in range(heads):
            k, v = (part[i, head * groups // heads] for part in (key, value))  # repeat_kv: neighbours share a head
            for row in range(length):
                seen = mask[i, row].nonzero().flatten()
                chance = (0.3 * k[seen] @ query[i, head, row]).softmax(0)
                torch.testing.assert_close(out[i, row, head], chance @ v[seen])


def test_a_pass_over_a_text_and_trees_is_attention_under_a_dense_mask() -> None:
    query, key, value = normal(2, 6, 7, 4), normal(2, 2, 7, 4), normal(2, 2, 7, 4)
    # Nodes 0 and 2 leave the text after its second and its last token, node 1 is below node 0.
    seen = TextAndTrees(torch.tensor([[2, 2, 4]]).expand(2, -1), torch.tensor([[2, 2, 3]]).expand(2, -1))
    dense = torch.zeros(7, 7, dtype=torch.bool)
    dense[:4, :4] = torch.ones(4, 4).tril()
    dense[4:, :4] = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    dense[4:, 4:] = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 1]])
    expected, _ = grouped_attention(nn.Module(), query, key, value, dense.expand(2, 1, -1, -1), scaling=0.3)
    out, _ = grouped_attention(nn.Module(), query, key, value, PassMask.of(seen, query[:, 0, :, 0]), scaling=0.3)
    torch.testing.assert_close(out, expected)

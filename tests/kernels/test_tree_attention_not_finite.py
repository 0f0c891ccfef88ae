"""Tree attention of numbers that are not finite: scores of −inf, and what one key or value reaches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_problems import in_parts, kernel, problem, reference
from torch import Tensor

from aurora_kernels import TreeMask, tree_attention

# Triton's interpreter computes with NumPy, which tells of every number that is none.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")


every_form = pytest.mark.parametrize("attend", [tree_attention, in_parts, kernel], ids=["plain", "in parts", "triton"])
every_term = pytest.mark.parametrize("terms", [{}, {"sinks": torch.zeros(4)}, {"softcap": 2.0}], ids=str)
PREFIX = [21, 4]


def excluded(columns: list[int], prefixes: list[int] = PREFIX) -> tuple[Tensor, Tensor, Tensor, TreeMask]:
    """A problem in which every query's score of some columns of the first slot is −inf, by the keys alone."""
    query, key, value, mask = problem(prefixes, 9)
    query[..., 0] = query[..., 0].abs() + 0.1
    key[0, :, columns, 0] = -math.inf
    return query, key, value, mask


def assert_equals(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-5, equal_nan=True)


@every_form
@every_term
@pytest.mark.parametrize(
    "columns",
    [[3, 21], [25, 28], list(range(21, 31)), list(range(21)), list(range(31))],
    ids=["text and root", "nodes", "the tree", "all text", "all"],
)
def test_a_score_of_minus_infinity_is_a_key_that_is_not_there(
    attend: Any, terms: dict[str, Any], columns: list[int]
) -> None:
    query, key, value, mask = excluded(columns)
    out = attend(query, key, value, mask, **terms)
    assert_equals(out, reference(query, key, value, mask, **terms))
    assert bool(out.isfinite().all())
    if len(columns) == 31 and "softcap" not in terms:  # which makes a finite score of it
        assert not bool(out[0].any())


@every_form
def test_a_sum_whose_logarithm_is_zero_is_one(attend: Any) -> None:
    """PyTorch says 0 for the logarithm of no sum, too."""
    query, key, value, mask = problem([1, 1], 3)
    key[:, :, :2] = 0.0  # all of the text, and all that the root sees of the tree
    assert_equals(attend(query, key, value, mask), reference(query, key, value, mask))
    chunk = TreeMask(mask.prefix[:1])
    query, key, value = query[:1], key[:1], value[:1]
    assert_equals(attend(query, key, value, chunk), reference(query, key, value, chunk))


@every_form
@every_term
@pytest.mark.parametrize("columns", [[2, 9], [12, 13], list(range(13)), list(range(9, 19))], ids=str)
def test_in_a_chunk_of_a_prompt_too(attend: Any, terms: dict[str, Any], columns: list[int]) -> None:
    query, key, value, _ = excluded(columns, [9])
    mask = TreeMask(torch.tensor([9]))
    assert_equals(attend(query, key, value, mask, **terms), reference(query, key, value, mask, **terms))


@every_form
@every_term
@pytest.mark.parametrize("junk", [math.nan, -math.inf])
@pytest.mark.parametrize("of", ["key", "value"])
@pytest.mark.parametrize("node", [0, 4])
def test_a_node_reaches_what_sees_it_alone(attend: Any, terms: dict[str, Any], junk: float, of: str, node: int) -> None:
    query, key, value, mask = problem(PREFIX, 9)
    expected = attend(query, key, value, mask, **terms)
    spoiled = {"key": key.clone(), "value": value.clone()}
    spoiled[of][0, 1, 21 + node, 5] = junk
    out = attend(query, spoiled["key"], spoiled["value"], mask, **terms)
    of_group = torch.arange(4) >= 2  # heads of the second key head
    sees = torch.zeros(out.shape[:3], dtype=torch.bool)
    sees[0] = of_group[:, None] & mask.seen[0, :, node]
    assert torch.equal(out[~sees], expected[~sees]), "what does not see it keeps its bits"
    right = reference(query, spoiled["key"], spoiled["value"], mask, **terms)
    # Where a value is not finite a kernel may spoil more of the row.
    assert torch.equal(out.isfinite().all(-1), right.isfinite().all(-1))
    fit = right.isfinite().all(-1)
    assert_equals(out[fit], right[fit])


@every_form
def test_columns_outside_of_a_window_and_after_a_tree_may_hold_anything(attend: Any) -> None:
    query, key, value, mask = problem([40, 9], 4)
    mask = TreeMask(mask.prefix, mask.seen, torch.stack([torch.arange(30, 35), torch.arange(5)]))
    expected = attend(query, key, value, mask)
    for junk in (key, value):
        junk[0, :, :30] = math.nan  # the first row's window starts here
        junk[:, :, 45:] = -math.inf
        junk[1, :, 14:] = math.nan
    assert torch.equal(attend(query, key, value, mask), expected)


@every_form
def test_in_a_prompt_what_is_not_a_number_reaches_later_rows_alone(attend: Any) -> None:
    query, key, value, _ = problem([9], 9)
    mask = TreeMask(torch.tensor([9]))
    expected = attend(query, key, value, mask)
    for junk in (key, value):
        spoiled = junk.clone()
        spoiled[:, :, 9 + 6] = math.nan
        out = attend(query, *((spoiled, value) if junk is key else (key, spoiled)), mask)
        assert torch.equal(out[:, :, :6], expected[:, :, :6]) and bool(out[:, :, 6:].isnan().all())


@every_form
@every_term
@pytest.mark.parametrize("junk", [math.nan, -math.inf])
def test_a_query_that_is_not_finite_has_the_result_of_its_scores(
    attend: Any, terms: dict[str, Any], junk: float
) -> None:
    query, key, value, mask = problem(PREFIX, 9)
    expected = attend(query, key, value, mask, **terms)
    query[0, :, 3, 2] = junk
    out = attend(query, key, value, mask, **terms)
    assert_equals(out[0, :, 3], reference(query, key, value, mask, **terms)[0, :, 3])
    assert "softcap" in terms and not math.isnan(junk) or bool(out[0, :, 3].isnan().all())
    out[0, :, 3] = expected[0, :, 3]
    assert torch.equal(out, expected)


@every_form
@every_term
@pytest.mark.parametrize("of", ["key", "value"])
def test_beside_a_score_of_minus_infinity_too(attend: Any, terms: dict[str, Any], of: str) -> None:
    """A row that sees a key that is not there, and not the node that is not a number, is not spoiled by the node."""
    query, key, value, mask = excluded([3, 21])
    {"key": key, "value": value}[of][0, :, 21 + 4] = math.nan
    out, right = attend(query, key, value, mask, **terms), reference(query, key, value, mask, **terms)
    assert torch.equal(out.isfinite().all(-1)[0], ~mask.seen[0, :, 4].expand(4, -1)) and bool(out[1].isfinite().all())
    fit = right.isfinite().all(-1)
    assert torch.equal(out.isfinite().all(-1), fit)
    assert_equals(out[fit], right[fit])


@every_form
@pytest.mark.parametrize("terms", [{}, {"sinks": torch.zeros(4)}], ids=str)
def test_the_value_of_a_score_of_minus_infinity_does_not_matter(attend: Any, terms: dict[str, Any]) -> None:
    query, key, value, mask = excluded([3, 21, 25])
    expected = reference(query, key, value, mask, **terms)
    value[0, :, [3, 21, 25]] = math.nan
    assert_equals(attend(query, key, value, mask, **terms), expected)


def gradients(out: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((out * torch.linspace(-1, 1, out.shape[-1])).sum(), of)


@pytest.mark.parametrize("terms", [{}, {"scale": 0.3}], ids=str)
def test_gradients_are_those_without_what_does_not_count(terms: dict[str, Any]) -> None:
    query, key, value, mask = problem([21, 4], 9)
    inputs = [each.requires_grad_() for each in (query, key, value)]
    expected = gradients(tree_attention(*inputs, mask, **terms), *inputs)
    spoiled = [query, *(each.detach().clone() for each in (key, value))]
    for each in spoiled[1:]:
        each[:, :, 31:] = math.nan  # after the first slot's tree, and the second's
        each[1, :, 14:] = -math.inf
        each.requires_grad_()
    out = tree_attention(*spoiled, mask, **terms)
    assert bool(out.isfinite().all())
    for found, right in zip(gradients(out, *spoiled), expected, strict=True):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("spoils", [False, True])
def test_gradients_of_a_row_are_not_those_of_others_that_are_not_finite(spoils: bool) -> None:
    query, key, value, mask = excluded([3])
    without = mask.dense(10, key.shape[2])
    without[0, :, 3] = False
    right_key = key.clone()
    right_key[0, :, 3] = 0.0
    inputs = [each.requires_grad_() for each in (query, right_key, value)]
    whole = TreeMask(torch.zeros(2, dtype=torch.int64), without)
    sees = mask.seen[:, None, :, 4].expand(-1, 4, -1) & (spoils & (torch.arange(2) == 0))[:, None, None]
    expected = gradients(tree_attention(*inputs, whole)[~sees], *inputs)
    spoiled = key.detach().clone()  # a score of column 3 is −inf
    if spoils:
        spoiled[0, :, 21 + 4] = math.nan
    spoiled.requires_grad_()
    out = tree_attention(query, spoiled, value, mask)
    assert torch.equal(out.isfinite().all(-1), ~sees)
    for found, right in zip(gradients(out[~sees], query, spoiled, value), expected, strict=True):
        torch.testing.assert_close(found, right)

"""How tensors are compared with what was published; the watchdogs' own tests have the faults themselves."""

from __future__ import annotations

import pytest
import torch

from aurora_rl.policies.faults import difference, same, sample, unchanged


def test_a_difference_is_named_by_its_kind() -> None:
    published = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for held, words in (
        (published.clone().fill_(float("nan")), "has 4 values that are infinite or not a number"),
        (published + torch.tensor([[float("inf"), 0.0], [0.0, 0.0]]), "has 1 value that is infinite or not a number"),
        (torch.zeros(2, 2), "is all zero"),
        (published.T.contiguous(), "is transposed"),
        (published + torch.tensor([[0.0, 1.0], [0.0, 0.0]]), "differs from what was published in 1 of 4 values"),
    ):
        assert difference(held, published) == words


def test_a_large_tensor_is_sampled_from_end_to_end() -> None:
    large = torch.arange(1 << 18)
    assert len(sample(large).values) <= 1 << 16 and int(sample(large).values[-1]) >= (1 << 18) - 4
    assert torch.equal(sample(large[:100].view(10, 10)).values, large[:100])


def rotary(rows: int) -> torch.Tensor:
    angles = torch.outer(torch.arange(rows).float(), 0.9 ** torch.arange(32))
    return torch.cat([angles.cos(), angles.sin()], 1)


@pytest.mark.parametrize("rows", [8, 5000])  # all numbers, and a sample of 320,000
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_table_that_is_cast_and_has_more_rows_is_what_it_was(rows: int, dtype: torch.dtype) -> None:
    longer = rotary(rows + 3)
    table = longer[:rows].clone()
    before = sample(table)
    for held in (table.to(dtype), longer.to(dtype)):
        assert unchanged(held, before) and unchanged(table, sample(held[:rows]))
        changed = held.clone()
        changed.view(-1)[(rows - 1) * 64 - (rows - 1) * 64 % before.step] += 1
        assert not unchanged(changed, before) and not unchanged(-held, before)
    for held in (table[:-1], table.T.contiguous(), table[:, :-1], table.flatten(), table.long(), table[None]):
        assert not unchanged(held, before)


def test_lists_of_ids_are_neither_cast_nor_longer() -> None:
    ids = torch.tensor([2, 4])
    assert unchanged(ids.clone(), sample(ids))
    for held in (torch.tensor([2, 4, 6]), ids.int(), ids.float(), ids.flip(0)):
        assert not unchanged(held, sample(ids))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_nan_is_nan(shape: tuple[int, ...]) -> None:
    empty = torch.full(shape, float("nan"))
    assert same(empty.clone(), empty) and unchanged(empty.clone(), sample(empty))
    assert unchanged(empty.bfloat16(), sample(empty))
    assert not same(empty.nan_to_num(), empty) and not unchanged(empty.nan_to_num(), sample(empty))

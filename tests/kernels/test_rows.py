"""Rows are cut without a gap or an overlap, and dtypes are those of the products and of what follows them."""

from __future__ import annotations

import pytest
import torch

from aurora_kernels.rows import _ENOUGH, _FEWEST, blocks, chunk_rows, log_softmax, product_dtype


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 30000), (3, 70000), (300, 1000)])
def test_blocks_cover_every_row_once(shape: tuple[int, int]) -> None:
    rows = [row for part in blocks(torch.empty(shape)) for row in range(part.start, part.stop)]
    assert rows == list(range(shape[0]))


def test_a_chunk_has_rows_enough_for_a_product_and_is_small_next_to_all() -> None:
    cpu = torch.device("cpu")
    assert chunk_rows(cpu, 4096, 10_000) > chunk_rows(cpu, 152_000, 10_000) >= _ENOUGH
    assert [chunk_rows(cpu, 152_000, count) for count in (0, 1, 70)] == [1, 1, 70]
    assert _FEWEST <= chunk_rows(cpu, 152_000, 1024) <= 1024 / 5


@pytest.mark.parametrize(
    ("dtype", "autocast", "product", "row"),
    [
        (torch.float32, False, torch.float32, torch.float32),
        (torch.float32, True, torch.bfloat16, torch.float32),
        (torch.bfloat16, False, torch.bfloat16, torch.float32),
        (torch.float64, True, torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype: torch.dtype, autocast: bool, product: torch.dtype, row: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert product_dtype(torch.ones(1, dtype=dtype)) == product
    assert log_softmax(torch.ones(1, 2, dtype=product)).dtype == row

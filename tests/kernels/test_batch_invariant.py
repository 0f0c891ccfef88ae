"""A row's bits do not depend on how many rows share a call, where it lies among them, or what they hold."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aurora_kernels.batch_invariant import (
    KEY_BLOCK,
    in_sizes,
    invariant_attention,
    invariant_elementwise,
    invariant_linear,
    invariant_sizes,
)

DTYPES = [torch.bfloat16, torch.float32]
GENERATOR = torch.Generator().manual_seed(0)


def cancelling(rows: int, outputs: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Rows and a weight whose products are what rounding leaves: another order of addition shows in every one."""
    x, weight = (torch.randn(size, width, generator=GENERATOR) for size in (rows, outputs))
    x *= torch.exp2(torch.randint(-4, 5, x.shape, generator=GENERATOR).float())
    half = width // 2
    x[:, half : 2 * half], weight[:, half : 2 * half] = -x[:, :half], weight[:, :half]
    return x.to(dtype), weight.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(576, 1536), (48, 32), (77, 33)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_treats_rows_alone(shape: tuple[int, int], dtype: torch.dtype, bias: bool) -> None:
    x, weight = cancelling(200, *shape, dtype)
    added = torch.randn(shape[0], generator=GENERATOR).to(dtype) if bias else None
    every = invariant_linear(x, weight, added)
    torch.testing.assert_close(every, F.linear(x, weight, added), rtol=0.05, atol=2.0)
    for count in (1, 2, 3, 5, 13, 33, 65, 130):
        assert torch.equal(invariant_linear(x[70 : 70 + count], weight, added), every[70 : 70 + count])
    assert torch.equal(invariant_linear(x.flip(0).view(2, 100, -1), weight, added).view(200, -1).flip(0), every)
    assert invariant_linear(x[:0], weight, added).shape == (0, shape[0])


def test_sizes_that_round_otherwise_are_not_used() -> None:
    def product_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
        def product(rows: Tensor) -> Tensor:
            calls.append(len(rows))
            out = rows @ weight.T
            if len(rows) < 12:
                return out + 1
            return out + torch.arange(len(rows))[:, None] if len(rows) == 48 else out  # by its place

        return product

    calls: list[int] = []
    sizes = invariant_sizes(product_of, 8, 6, torch.float64)
    assert sizes == (12, 16, 24, 32, 64, 96, 128)
    product, x = product_of(torch.randn(8, 6).double()), torch.randn(300, 6).double()
    calls.clear()
    assert in_sizes(product, x, sizes).shape == (300, 8) and calls == [128, 128, 64]
    calls.clear()
    assert in_sizes(product, x[:1], sizes).shape == (1, 8) and calls == [12]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1536, 100])
@pytest.mark.parametrize("function", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh")])
def test_an_activation_treats_elements_alone(
    function: Callable[[Tensor], Tensor], width: int, dtype: torch.dtype
) -> None:
    both = 3 * torch.randn(64, 2 * width, generator=GENERATOR).to(dtype)
    for x in (both[:, :width], both[:, :width].contiguous()):
        every = invariant_elementwise(function, x)
        torch.testing.assert_close(every, function(x))
        for count in (1, 2, 3, 33):
            assert torch.equal(invariant_elementwise(function, x[5 : 5 + count]), every[5 : 5 + count])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("groups", "per_group", "d"), [(3, 3, 64), (1, 8, 40), (2, 4, 128), (4, 1, 64)])
def test_attention_treats_tokens_alone(groups: int, per_group: int, d: int, dtype: torch.dtype) -> None:
    texts, length, columns = 2, 9, 2 * KEY_BLOCK
    query = 2 * torch.randn(texts, groups * per_group, length, d, generator=GENERATOR).to(dtype)
    key, value = (torch.randn(texts, groups, columns, d, generator=GENERATOR).to(dtype) for _ in range(2))
    sizes = torch.randint(1, KEY_BLOCK, (texts, length), generator=GENERATOR)
    mask = (torch.arange(columns) < sizes[..., None]).view(-1, 1, 1, columns)
    every = invariant_attention(query, key, value, mask)
    expected = F.scaled_dot_product_attention(
        query.double(), *(x.double().repeat_interleave(per_group, 1) for x in (key, value)),
        attn_mask=mask.view(texts, 1, length, columns),
    )  # fmt: skip
    torch.testing.assert_close(every.double(), expected.transpose(1, 2), rtol=0.05, atol=0.05)
    for text, token in ((0, 0), (0, 7), (1, 3)):
        here = slice(text, text + 1)
        alone = invariant_attention(
            query[here, :, token : token + 1], key[here, :, :KEY_BLOCK], value[here, :, :KEY_BLOCK],
            mask[text * length + token][None, :, :, :KEY_BLOCK],
        )  # fmt: skip
        assert torch.equal(alone[0, 0], every[text, token])
        # What it does not see may be anything.
        spoiled = key.clone()
        spoiled[text, :, sizes[text, token] :] = 9.0
        assert torch.equal(invariant_attention(query, spoiled, value, mask)[text, token], every[text, token])
    own = [x[:, None].expand(-1, length, -1, -1, -1).flatten(0, 1) for x in (key, value)]
    assert torch.equal(invariant_attention(query, *own, mask), every)


def test_a_part_of_a_key_block_is_refused() -> None:
    x = torch.zeros(1, 1, 500, 4)
    with pytest.raises(ValueError, match="keys have 500 columns; pad them to a multiple of 512"):
        invariant_attention(x[:, :, :1], x, x, torch.ones(1, 1, 1, 500, dtype=torch.bool))


def test_plain_operations_do_not_treat_rows_alone() -> None:
    # Otherwise the tests above could not fail.
    x, weight = cancelling(64, 576, 1536, torch.float32)
    assert not torch.equal(F.linear(x, weight)[:1], F.linear(x[:1], weight))
    x = 3 * torch.randn(512, 100, generator=GENERATOR)
    assert not torch.equal(F.silu(x), torch.cat([F.silu(row) for row in x.split(1)]))

"""Operations of a forward pass whose result for a row depends on that row alone, bit for bit.

Matrix kernels round by the number of rows in a call, vector kernels by where an element lies, attention by the number
of columns. So the last bits of a token's logits differ between a pass over it alone and one over a tree or a batch.
These operations prevent that. Products are called with numbers of rows that were found to agree, and activations row by
row where it matters. Attention takes each token by itself and its keys in whole blocks.

Legend: ``b`` texts, ``T`` tokens of each, ``L`` columns, ``d`` head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

KEY_BLOCK = 512
"""Keys are read in blocks of so many columns, as attention on a CPU does; a part of a block rounds otherwise."""

# Numbers of rows that a product may be called with.
_SIZES = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Queries of a head group are padded to a multiple of so many rows, so that the buffers of every thread are aligned.
_QUERY_ROWS = 8
# Vector kernels take so many elements at a time, or a divisor, and others one by one. Below _SERIAL elements a call
# is not divided among threads.
_LANES, _SERIAL = 64, 2**15 - 1
_DISTINCT = 1024  # rows of a weight by which sizes are tried; it repeats them

Product = Callable[[Tensor], Tensor]
"""A product of rows ``[r, in]`` with a weight: ``[r, out]``."""


def invariant_sizes(
    product_of: Callable[[Tensor], Product],
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    device: str = "cpu",
) -> tuple[int, ...]:
    """Find the numbers of rows with which a product computes every row alike, wherever the row lies.

    They are tried on numbers that cancel, so that rounding decides the result. What is found holds for the machine and
    its number of threads.

    Args:
        product_of: Returns the product with a weight ``[out, in]``.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        dtype: Dtype of weight and rows.
        device: Device of both.

    Returns:
        Numbers of rows, rising; at least one.

    Example:
        >>> sizes = invariant_sizes(lambda weight: lambda rows: rows @ weight.T, 8, 16, torch.float32)
        >>> len(sizes) >= 1 and list(sizes) == sorted(sizes)
        True
    """
    generator, half = torch.Generator().manual_seed(0), in_features // 2
    rows = torch.randn(_SIZES[-1], in_features, generator=generator)
    rows *= torch.exp2(torch.randint(-4, 5, rows.shape, generator=generator).float())
    weight = torch.randn(min(out_features, _DISTINCT), in_features, generator=generator)
    rows[:, half : 2 * half] = -rows[:, :half]
    weight[:, half : 2 * half] = weight[:, :half]  # so that the products cancel
    rows, weight = rows.to(device, dtype), weight.to(device, dtype)
    product = product_of(weight.repeat(-(-out_features // len(weight)), 1)[:out_features])
    expected = product(rows)

    def agrees(size: int) -> bool:
        first, last = rows[:size], rows[len(rows) - size :]
        return (
            torch.equal(product(first), expected[:size])
            and torch.equal(product(last), expected[len(rows) - size :])
            and torch.equal(product(first.flip(0)).flip(0), expected[:size])
        )

    return (*(size for size in _SIZES[:-1] if agrees(size)), _SIZES[-1])


def in_sizes(product: Product, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Apply a product to ``x`` ``[..., in]`` by calls of the given numbers of rows; padding fills the last."""
    rows, parts = x.reshape(-1, x.shape[-1]), []
    for part in rows.split(sizes[-1]):
        size = next(size for size in sizes if size >= len(part))
        padded = part if size == len(part) else F.pad(part, (0, 0, 0, size - len(part)))
        parts.append(product(padded)[: len(part)])
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(*x.shape[:-1], out.shape[-1])


@functools.lru_cache
def _linear_sizes(shape: torch.Size, dtype: torch.dtype, device: str, bias: bool, threads: int) -> tuple[int, ...]:
    def product_of(weight: Tensor) -> Product:
        added = weight.new_zeros(len(weight)) if bias else None
        return lambda rows: F.linear(rows, weight, added)

    return invariant_sizes(product_of, shape[0], shape[1], dtype, device)


def invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias`` so that a row's result does not depend on the other rows.

    The first call of a shape finds out how its rows may be grouped, see :func:`invariant_sizes`.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or None.

    Returns:
        ``[..., out]``.

    Example:
        >>> x, weight = torch.randn(20, 64), torch.randn(32, 64)
        >>> torch.equal(invariant_linear(x, weight)[7], invariant_linear(x[7], weight))
        True
    """
    sizes = _linear_sizes(weight.shape, weight.dtype, str(weight.device), bias is not None, torch.get_num_threads())
    return in_sizes(lambda rows: F.linear(rows, weight, bias), x, sizes)


def invariant_elementwise(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a function of single elements to ``x`` ``[..., n]`` so that an element's result does not depend on its row.

    Vector kernels compute what their lanes leave over in another way, and some functions have another kernel for views.

    Example:
        >>> x = torch.randn(3, 100)
        >>> torch.equal(invariant_elementwise(F.silu, x)[1], invariant_elementwise(F.silu, x[1:2])[0])
        True
    """
    width = x.shape[-1]
    parts = x.reshape(-1, width).contiguous().split(1 if width % _LANES else max(_SERIAL // width, 1))
    return torch.cat([function(part) for part in parts]).view(x.shape)


def invariant_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attend with every token by itself: its result does not depend on other tokens, nor on columns that it masks.

    The columns must have a token's keys in the order of their positions, from column 0 on: a key in another column is
    added in another order.

    Args:
        query: Queries, ``[b, heads, T, d]``.
        key: Keys, ``[b, groups, L, d]``, or ``[b * T, groups, L, d]`` if each token has its own. ``L`` is a multiple of
            :data:`KEY_BLOCK`.
        value: Values, of the shape of the keys.
        mask: Columns that each token sees, ``[b * T, 1, 1, L]`` bool.
        scale: Factor on the scores; None is ``d ** -0.5``.

    Returns:
        ``[b, T, heads, d]``.

    Raises:
        ValueError: ``L`` is no multiple of :data:`KEY_BLOCK`.

    Example:
        >>> query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 512, 8)
        >>> mask = torch.arange(512) <= torch.arange(3)[:, None, None, None]
        >>> together = invariant_attention(query, key, key, mask)
        >>> torch.equal(together[:, 2:], invariant_attention(query[:, :, 2:], key, key, mask[2:]))
        True
    """
    if key.shape[2] % KEY_BLOCK:
        raise ValueError(f"keys have {key.shape[2]} columns; pad them to a multiple of {KEY_BLOCK} and mask the rest")
    b, heads, length, d = query.shape
    per_group = heads // key.shape[1]
    rows = query.transpose(1, 2).reshape(b, length, key.shape[1], per_group, d)
    rows, masks = F.pad(rows, (0, 0, 0, -per_group % _QUERY_ROWS)), mask.unflatten(0, (b, length))
    if len(key) == b * length:
        out = F.scaled_dot_product_attention(rows.flatten(0, 1), key, value, attn_mask=mask, scale=scale)
    else:
        # A text at a time: its tokens share keys that are not copied.
        texts = zip(rows, key, value, masks, strict=True)
        out = torch.cat(
            [
                F.scaled_dot_product_attention(
                    q, k.expand(length, *k.shape), v.expand(length, *v.shape), attn_mask=seen, scale=scale
                )
                for q, k, v, seen in texts
            ]
        )
    return out[:, :, :per_group].reshape(b, length, heads, -1)

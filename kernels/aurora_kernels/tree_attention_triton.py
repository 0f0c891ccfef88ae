"""Tree attention in Triton: keys are split over programs, and all heads of a group share each key that is read.

Legend: see :mod:`aurora_kernels.tree_attention`; ``R = G * T`` rows of a key head. Row ``r`` is query ``r // G`` of the
group's head ``r % G``.

A program takes some rows of a key head and a range of its columns, and writes their attention with the logarithm of the
sum of its exponentials. A second kernel weighs the ranges by these. Columns of the text are seen by all rows, up to a
window, so that no mask is read for them.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from aurora_kernels.tree_mask import TreeMask

# Bytes of a block of keys: two such of keys and of values are under way at a time.
_BLOCK_BYTES = 2**14
# Fewest columns of a program's range. A range of few columns writes as much as it reads.
_FEWEST = 512
_LOG2E = math.log2(math.e)


@triton.jit
def _add_block(
    acc, largest, total, rows, columns, inside, visible, key, value, table, k_slot, v_slot, k_column, v_column,
    inner, outer, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAPPED: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Add a block of columns to the running attention of some rows."""
    if PAGE:
        page = tl.load(table + columns // PAGE, mask=inside, other=0).to(tl.int64)
        k_at, v_at = page * k_slot + columns % PAGE * k_column, page * v_slot + columns % PAGE * v_column
    else:
        k_at, v_at = columns.to(tl.int64) * k_column, columns.to(tl.int64) * v_column
    of_key, of_value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    keys = tl.load(key + k_at[None, :] + of_key[:, None], mask=inside[None, :] & (of_key[:, None] < D), other=0.0)
    scores = tl.dot(rows, keys, input_precision="ieee") * inner
    if CAPPED:
        scores = (2 * tl.sigmoid(2 * scores) - 1) * outer
    scores = tl.where(visible, scores, -float("inf"))
    new = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(new == -float("inf"), 0.0, new)  # rows that have seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    kept = tl.exp2(largest - base)
    values = tl.load(
        value + v_at[:, None] + of_value[None, :], mask=inside[:, None] & (of_value[None, :] < DV), other=0.0
    )
    # 0 times what is not finite is not 0: such values are left out of the product, and spoil the rows that count them.
    wrong = (values != values) | (tl.abs(values) == float("inf"))
    spoiled = tl.max(tl.where(scores != -float("inf"), tl.max(wrong.to(tl.int32), 1)[None, :], 0), 1) > 0
    values = tl.where(wrong, 0.0, values).to(values.dtype)
    acc = acc * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    acc = tl.where(spoiled[:, None], float("nan"), acc)
    return acc, new, total * kept + tl.sum(weights, 1)


# Neither a tree's size nor a text's length compiles it anew.
@triton.jit(do_not_specialize=["s_slot", "s_row", "slots", "length", "width", "per_range", "end", "blocks"])
def _attend_kernel(
    query, key, value, prefix, words, first, table, sinks, out, sums,
    q_slot, q_head, q_row, k_slot, k_head, k_column, v_slot, v_head, v_column, s_slot, s_row,
    inner, outer, slots, length, width, per_range, end, blocks,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAPPED: tl.constexpr,
    SINKS: tl.constexpr, PAGE: tl.constexpr, ONE_WORD: tl.constexpr,
):  # fmt: skip
    """Attend from a block of rows of a key head (program 0 and 1) to a range of columns (program 2)."""
    block, split = tl.program_id(0), tl.program_id(2)
    groups = tl.num_programs(1) // slots
    slot, group = (tl.program_id(1) // groups).to(tl.int64), tl.program_id(1) % groups
    row = block * ROWS + tl.arange(0, ROWS)
    token, head = row // GROUP, group * GROUP + row % GROUP
    live = token < length
    of_key = tl.arange(0, BLOCK_D)
    rows = tl.load(
        query + slot * q_slot + head[:, None] * q_head + token[:, None] * q_row + of_key[None, :],
        mask=live[:, None] & (of_key[None, :] < D),
        other=0.0,
    )
    key += group * k_head
    value += group * v_head
    if PAGE:
        table += slot * blocks
    else:
        key += slot * k_slot
        value += slot * v_slot
    text = tl.load(prefix + slot).to(tl.int32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if SINKS:
        if split == 0:
            largest = tl.load(sinks + head, mask=live, other=0.0).to(tl.float32) * 1.4426950408889634
            total += 1.0

    start = split * per_range
    stop = tl.minimum(start + per_range, text)
    if WINDOW:
        bound = tl.load(first + slot * length + token, mask=live, other=2147483647).to(tl.int32)
        start = tl.maximum(start, tl.min(bound, 0))
    for at in range(start, stop, COLUMNS):
        columns = at + tl.arange(0, COLUMNS)
        inside = columns < stop
        visible = inside[None, :]
        if WINDOW:
            visible = visible & (columns[None, :] >= bound[:, None])
        acc, largest, total = _add_block(
            acc, largest, total, rows, columns, inside, visible, key, value, table, k_slot, v_slot, k_column, v_column,
            inner, outer, D, DV, BLOCK_D, BLOCK_DV, CAPPED, PAGE,
        )  # fmt: skip

    start = tl.maximum(split * per_range - text, 0)
    stop = tl.minimum(tl.minimum((split + 1) * per_range, end) - text, width)
    if CAUSAL:
        stop = tl.minimum(stop, (block * ROWS + ROWS - 1) // GROUP + 1)
    words += slot * s_slot + token * s_row
    if ONE_WORD:
        word = tl.load(words, mask=live, other=0)
    for at in range(start, stop, COLUMNS):
        node = at + tl.arange(0, COLUMNS)
        inside = node < stop
        if CAUSAL:
            visible = inside[None, :] & (node[None, :] <= token[:, None])
        else:
            if ONE_WORD:
                bits = word[:, None]
            else:
                bits = tl.load(words[:, None] + node[None, :] // 64, mask=live[:, None] & inside[None, :], other=0)
            visible = inside[None, :] & (((bits >> (node[None, :] % 64).to(tl.int64)) & 1) != 0)
        acc, largest, total = _add_block(
            acc, largest, total, rows, text + node, inside, visible, key, value, table, k_slot, v_slot, k_column,
            v_column, inner, outer, D, DV, BLOCK_D, BLOCK_DV, CAPPED, PAGE,
        )  # fmt: skip

    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    place = ((split * slots + slot) * length + token) * groups * GROUP + head
    of_value = tl.arange(0, BLOCK_DV)
    tl.store(
        out + place[:, None] * DV + of_value[None, :],
        acc.to(out.dtype.element_ty),
        mask=live[:, None] & (of_value[None, :] < DV),
    )
    tl.store(sums + place, tl.where(some, largest + tl.log2(tl.where(some, total, 1.0)), -float("inf")), mask=live)


@triton.jit(do_not_specialize=["rows", "splits"])
def _merge_kernel(parts, sums, out, rows, splits, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """Weigh the ranges of a row of a head by their sums."""
    row = tl.program_id(0).to(tl.int64)
    of_value = tl.arange(0, BLOCK_DV)
    largest = tl.load(sums + row)
    for split in range(1, splits):
        largest = tl.maximum(largest, tl.load(sums + split * rows + row))
    base = tl.where(largest == -float("inf"), 0.0, largest)
    acc, total = tl.zeros([BLOCK_DV], tl.float32), 0.0
    for split in range(splits):
        place = split * rows + row
        weight = tl.exp2(tl.load(sums + place) - base)
        acc += weight * tl.load(parts + place * DV + of_value, mask=of_value < DV, other=0.0)
        total += weight
    acc = acc / tl.where(total > 0, total, 1.0)
    tl.store(out + row * DV + of_value, acc.to(out.dtype.element_ty), mask=of_value < DV)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    block_table: Tensor | None,
    *,
    splits: int | None = None,
) -> Tensor:
    """Attend as :func:`aurora_kernels.tree_attention` does, by the kernels; 0 for a query that sees nothing.

    Args:
        query: Queries, ``[b, h, T, d]``.
        key: Keys, ``[b, g, L, d]``, or of pages, ``[pages, g, page, d]``.
        value: Values, ``[b, g, L, dv]``, or of pages, ``[pages, g, page, dv]``.
        mask: Keys that each query sees.
        scale: Factor on the scores.
        softcap: Bound on the absolute value of a score; None for no bound.
        sinks: Score of nothing for each head, ``[h]``; None for no such score.
        block_table: Page of each ``page`` columns of a slot, ``[b, blocks]`` int64; None if keys are contiguous.
        splits: Most ranges of columns of a row; None chooses by the number of processors.

    Returns:
        ``[b, h, T, dv]``.
    """
    (b, heads, length, d), (_, groups, page, _), dv = query.shape, key.shape, value.shape[-1]
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    columns = page if block_table is None else page * block_table.shape[1]
    group = heads // groups
    block_d, block_dv = (max(triton.next_power_of_2(size), 16) for size in (d, dv))
    column_bytes = max(block_d, block_dv) * key.element_size()
    block = min(max(_BLOCK_BYTES // column_bytes, 16), 128)
    rows = row_block(group * length, column_bytes, block, _shared_memory(query.device))
    programs = triton.cdiv(group * length, rows) * b * groups
    if splits is None:
        wanted = triton.cdiv(2 * _processors(query.device), programs)
        splits = max(min(wanted, columns // _FEWEST), 1)
    per_range = triton.cdiv(triton.cdiv(columns, splits), block) * block
    splits = triton.cdiv(columns, per_range)

    out = query.new_empty(b, length, heads, dv)
    parts = out if splits == 1 else query.new_empty(splits, b, length, heads, dv, dtype=torch.float32)
    sums = query.new_empty(splits, b, length, heads, dtype=torch.float32)
    words = torch.zeros(1, 1, 1, dtype=torch.int64, device=query.device) if mask.seen is None else mask.words
    first = query if mask.first is None else mask.first.contiguous()
    inner, outer = (scale * _LOG2E, 0.0) if softcap is None else (scale / softcap, softcap * _LOG2E)
    with torch.cuda.device_of(query):
        _attend_kernel[triton.cdiv(group * length, rows), b * groups, splits](
            query, key, value, mask.prefix, words, first,
            query if block_table is None else block_table.contiguous(), query if sinks is None else sinks,
            parts, sums, *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *words.stride()[:2],
            inner, outer, b, length, length if mask.seen is None else mask.seen.shape[2], per_range, columns,
            0 if block_table is None else block_table.shape[1],
            GROUP=group, D=d, DV=dv, BLOCK_D=block_d, BLOCK_DV=block_dv, ROWS=rows, COLUMNS=block,
            CAUSAL=mask.seen is None, WINDOW=mask.first is not None, CAPPED=softcap is not None,
            SINKS=sinks is not None, PAGE=0 if block_table is None else page,
            ONE_WORD=mask.seen is not None and words.shape[2] == 1,
            num_warps=8 if rows == 128 else 4, num_stages=2,
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[b * length * heads,](parts, sums, out, b * length * heads, splits, DV=dv, BLOCK_DV=block_dv)
    return out.transpose(1, 2)


def row_block(count: int, row_bytes: int, columns: int, shared: int) -> int:
    """Return the rows of a program: at most 128, and so few that they fit into shared memory with its keys and values.

    Args:
        count: Rows of a key head.
        row_bytes: Bytes of a row, of a key or of a value.
        columns: Columns of a block, two of which are under way at a time.
        shared: Bytes of shared memory that a program may have.

    Example:
        >>> [row_block(256, 512, 32, shared) for shared in (101376, 232448)]  # float32, head size 128: Ada and Hopper
        [64, 128]
    """
    fitting = max(shared // row_bytes - 4 * columns, 16)
    return min(max(triton.next_power_of_2(count), 16), 128, 1 << (fitting.bit_length() - 1))


def _processors(device: torch.device) -> int:
    """Return the number of programs that run at a time, or 1 in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have: 101,376 on Ada, 232,448 on Hopper."""
    if device.type != "cuda":
        return 2**17  # the interpreter has no limit
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))

"""Which KV slot holds which token: the table `req_to_token` `[requests, pool_len]`, and moves of rows between slots.

`req_pool_indices` `[b]` names each request's row of the table, `start_offset` and `end_offset` `[b]` a range of its
positions. Results are written into tensors that the caller has made; `pool_len`, the table's width, is read off it.
"""

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor


def _ranges(req_pool_indices: Tensor, start_offset: Tensor, end_offset: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """For each request: its row of the table, its range there, and where that lies when all ranges are joined."""
    joined = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        yield row, slice(start, end), slice(joined, joined + end - start)
        joined += end - start


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """Write newly allocated slots, those of all requests joined, into each request's range of the table."""
    for row, own, joined in _ranges(req_pool_indices, start_offset, end_offset):
        req_to_token[row, own] = out_cache_loc[joined].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
) -> None:
    """Read each request's range of the table, joined, into the beginning of `out_cache_loc`."""
    for row, own, joined in _ranges(req_pool_indices, start_offset, end_offset):
        out_cache_loc[joined] = req_to_token[row, own].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Read the `topk * num_steps` slots after each request's text, where its drafts are going to be written."""
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, req_pool_indices: Tensor, seq_lens: Tensor, topk: int, num_steps: int, pool_len: int
) -> Tensor:
    """Give every branch of a draft tree a table row of its own, `[b * topk, pool_len]`: the shared text, then itself.

    Branch k's slots lie k * num_steps after the text. In its own row they follow the text directly, which makes
    a step of drafting an ordinary decoding step of `b * topk` requests.
    """
    table = req_to_token[req_pool_indices].repeat_interleave(topk, dim=0)
    steps = torch.arange(num_steps)
    ends = seq_lens.repeat_interleave(topk)[:, None] + steps
    branches = num_steps * torch.arange(topk).repeat(len(seq_lens))[:, None]
    return table.scatter(1, ends, table.gather(1, ends + branches))


def copy_all_layer_kv_cache_cpu(data_ptrs: Tensor, strides: Tensor, tgt_loc: Tensor, src_loc: Tensor) -> None:
    """Copy rows `src_loc` to rows `tgt_loc` in each of the buffers at `data_ptrs`, whose rows have `strides` bytes.

    All rows are read before the first is written: sources and targets may overlap.
    """
    if not len(src_loc):
        return
    num_rows = 1 + int(torch.maximum(src_loc, tgt_loc).max())
    for address, row_bytes in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (num_rows * row_bytes)).from_address(address)
        rows = torch.frombuffer(memory, dtype=torch.uint8).view(num_rows, row_bytes)
        rows[tgt_loc] = rows[src_loc]

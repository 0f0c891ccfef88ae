"""Verification of draft trees, attention alone: time by nodes, text and slots, against other ways to compute it.

A cell is one layer's attention from a root and its nodes to a text and to themselves, with keys as a cache has them. On
a GPU the cache is flushed between calls, and every time stands next to that of reading keys and values at the bandwidth
that this run measured. All ways of a cell must agree with attention in float32. Ways take turns.

    python benchmarks/tree_attention.py --nodes 0,4,16 --texts 512,4096 --slots 1,8 --threads 2
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, parse, write_result
from torch import Tensor

from aurora_kernels import TreeMask, tree_attention

AGREE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}


class Problem(NamedTuple):
    """Tensors of a cell."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: TreeMask

    @property
    def group(self) -> int:
        return self.query.shape[1] // self.key.shape[1]


def problem(options: argparse.Namespace, slots: int, nodes: int, text: int) -> Problem:
    torch.manual_seed(0)
    device, dtype = options.device, getattr(torch, options.dtype)
    columns, size = text + nodes + 1, options.head_size
    query = torch.randn(slots, options.heads, nodes + 1, size, device=device, dtype=dtype)
    key, value = (
        torch.randn(slots, columns, options.key_heads, size, device=device, dtype=dtype).transpose(1, 2)
        for _ in range(2)
    )
    seen = torch.eye(nodes + 1).bool()
    for node in range(1, nodes + 1):
        seen[node] |= seen[int(torch.randint(node, ()))]
    prefix = torch.full((slots,), text)
    if options.ragged:  # from half of the text on
        prefix = torch.linspace(text // 2, text, slots).long()
    mask = TreeMask(prefix.to(device), seen.repeat(slots, 1, 1).to(device))
    return Problem(query, key, value, mask)


# ---- ways to compute it: each prepares what all layers of a pass share, and returns a layer's attention ------------


def ours(p: Problem) -> Callable[[], Tensor]:
    return lambda: tree_attention(p.query, p.key, p.value, p.mask)


def grouped_mask(p: Problem) -> Callable[[], Tensor]:
    """SDPA with the queries of a group as rows, under a bool mask: what the engine did before."""
    dense = p.mask.dense(p.query.shape[2], p.key.shape[2]).repeat(1, p.group, 1)[:, None]
    rows = p.query.reshape(len(p.query), p.key.shape[1], -1, p.query.shape[-1])
    return lambda: F.scaled_dot_product_attention(rows, p.key, p.value, attn_mask=dense).reshape(p.query.shape)


def repeated_keys(p: Problem) -> Callable[[], Tensor]:
    """SDPA with repeated keys, as transformers computes it."""
    dense = p.mask.dense(p.query.shape[2], p.key.shape[2])[:, None]

    def run() -> Tensor:
        key, value = (part.repeat_interleave(p.group, dim=1) for part in (p.key, p.value))
        return F.scaled_dot_product_attention(p.query, key, value, attn_mask=dense)

    return run


def flex(p: Problem) -> Callable[[], Tensor]:
    """FlexAttention, compiled, with a block mask that all layers share."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    (b, _, length, _), columns = p.query.shape, p.key.shape[2]
    prefix, seen = p.mask.prefix, p.mask.seen

    def visible(slot: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        node = column - prefix[slot]
        return (node < 0) | (seen[slot, row, node.clamp(0, length - 1)] & (node >= 0) & (node < length))

    blocks = create_block_mask(visible, b, None, length, columns, device=str(p.query.device))
    compiled = functools.partial(torch.compile(flex_attention, dynamic=False), enable_gqa=True)
    return lambda: compiled(p.query, p.key, p.value, block_mask=blocks)


def sglang(p: Problem) -> Callable[[], Tensor]:
    """The Triton kernel by which SGLang verifies trees, with its own form of masks and of a cache."""
    from sglang.kernels.ops.attention.extend_attention import extend_attention_fwd

    b, heads, length, size = p.query.shape
    at = torch.arange(length, device=p.query.device)
    rows = p.mask.prefix[:, None] + at
    slot = torch.arange(b, device=p.query.device)[:, None]
    query = p.query.transpose(1, 2).reshape(-1, heads, size)
    own_key, own_value = (part.transpose(1, 2)[slot, rows].flatten(0, 1) for part in (p.key, p.value))
    pool_key, pool_value = (part.transpose(1, 2).reshape(-1, *part.shape[1::2]) for part in (p.key, p.value))
    zero = p.mask.prefix.new_zeros(1)
    kv_start = torch.cat([zero, p.mask.prefix.cumsum(0)]).int()
    columns, texts = p.key.shape[2], p.mask.prefix.tolist()
    indices = torch.cat([torch.arange(n, device=zero.device) + columns * i for i, n in enumerate(texts)])
    every = p.mask.dense(length, columns)
    dense = [each[:, : n + length].flatten() for each, n in zip(every, texts, strict=True)]
    mask_start = torch.cat([zero, torch.tensor([len(each) for each in dense], device=zero.device).cumsum(0)])
    starts = (torch.arange(b + 1, device=zero.device) * length).int()
    flat, out = torch.cat(dense), torch.empty_like(query)

    def run() -> Tensor:
        extend_attention_fwd(
            query, own_key, own_value, out, pool_key, pool_value, starts, kv_start, indices, flat, False, mask_start,
            length, 1.0, 1.0, sm_scale=size**-0.5,
        )  # fmt: skip
        return out.view(b, length, heads, size).transpose(1, 2)

    return run


def ways_on(device: str) -> dict[str, Callable[[Problem], Callable[[], Tensor]]]:
    found = {"tree_attention": ours, "sdpa, packed heads": grouped_mask, "sdpa, repeated keys": repeated_keys}
    if device.startswith("cuda"):
        found["flex_attention"] = flex
        if importlib.util.find_spec("sglang"):
            found["sglang"] = sglang
    return found


# ---- measuring ---------------------------------------------------------------------------------------------------


def timer(device: str) -> Callable[[Callable[[], Any]], float]:
    """Return a function that calls another and says how many microseconds that took."""
    if not device.startswith("cuda"):

        def on_cpu(run: Callable[[], Any]) -> float:
            began = time.perf_counter()
            run()
            return (time.perf_counter() - began) * 1e6

        return on_cpu
    flush = torch.empty(2**28, dtype=torch.int8, device=device)

    def on_gpu(run: Callable[[], Any]) -> float:
        flush.zero_()
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        run()
        ended.record()
        torch.cuda.synchronize()
        return began.elapsed_time(ended) * 1e3

    return on_gpu


def bandwidth(device: str, measure: Callable[[Callable[[], Any]], float]) -> float:
    """Bytes a microsecond that this device reads."""
    data = torch.ones(2**26 if device == "cpu" else 2**28, device=device)
    return data.nbytes / min(measure(data.sum) for _ in range(5))


def reference(p: Problem) -> Tensor:
    """Attention in float32, a slot at a time."""
    dense, slots = p.mask.dense(p.query.shape[2], p.key.shape[2]), []
    for query, key, value, seen in zip(p.query, p.key, p.value, dense, strict=True):
        key, value = (part.float().repeat_interleave(p.group, dim=0) for part in (key, value))
        slots.append(F.scaled_dot_product_attention(query.float(), key, value, attn_mask=seen))
    return torch.stack(slots)


def cell(options: argparse.Namespace, slots: int, nodes: int, text: int, bytes_a_us: float) -> dict[str, Any]:
    p, measure = problem(options, slots, nodes, text), timer(options.device)
    expected, runs, failed = reference(p), {}, {}
    for name, prepare in ways_on(options.device).items():
        try:
            runs[name] = prepare(p)
            error = float((runs[name]().float() - expected).abs().max())
        except Exception as raised:  # a peer that does not run on this device or in this version
            failed[name] = f"{type(raised).__name__}: {str(raised).splitlines()[0] if str(raised) else ''}"
            runs.pop(name, None)
        else:
            if not error <= AGREE[options.dtype]:
                failed[name] = f"differs by {error:.2g}"
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.repeats):
        for name, run in runs.items():
            taken[name].append(measure(run))
    read = 2 * int(p.mask.prefix.sum() + slots * (nodes + 1)) * options.key_heads * options.head_size
    limit = read * p.key.element_size() / bytes_a_us
    us = {name: round(statistics.median(each), 1) for name, each in taken.items()}
    print(f"{slots} slots, {nodes} nodes, text {text}; reading takes {limit:.1f} us: {us} {failed or ''}", flush=True)
    return {"slots": slots, "nodes": nodes, "text": text, "reading_us": round(limit, 1), "us": us, "failed": failed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", default="1,8")
    parser.add_argument("--nodes", default="0,4,16,64")
    parser.add_argument("--texts", default="512,2048,8192")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--ragged", action="store_true", help="texts of half to the whole length")
    parser.add_argument("--dtype", default="bfloat16", choices=list(AGREE))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    rate = bandwidth(options.device, timer(options.device))
    print(f"bandwidth {rate / 1e3:.1f} GB/s")
    grid = [[int(each) for each in part.split(",")] for part in (options.slots, options.nodes, options.texts)]
    cells = [cell(options, b, nodes, text, rate) for b in grid[0] for nodes in grid[1] for text in grid[2]]
    shape = {key: getattr(options, key) for key in ("heads", "key_heads", "head_size", "dtype", "ragged", "threads")}
    write_result(__file__, options, {**shape, "gigabytes_a_second": round(rate / 1e3, 1), "cells": cells})


if __name__ == "__main__":
    main()

"""The two-head drafter loss against its matrix products alone and against other ways to compute it: time and memory.

Each measurement is a forward and a backward pass with gradients in states and head, in a process of its own. Memory is
the peak above inputs and gradients. All ways of a cell must agree on the loss and on a projection of its gradients.

    python benchmarks/kernels.py --rows 256,1024 --vocabs 8192 --threads 2
    python benchmarks/kernels.py --device cuda --dtype bfloat16 --width 4096 --rows 1024,8192 --vocabs 32768,152064
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, write_result
from torch import Tensor

from aurora_kernels import ClosedForm, HeadTarget, closed_form, two_head_loss
from aurora_kernels.rows import chunk_rows, log_softmax
from aurora_rl.objectives import get_divergence

STATUS, CLEAR, MEMINFO = Path("/proc/self/status"), Path("/proc/self/clear_refs"), Path("/proc/meminfo")
WHOLE = {"naive": 8, "products of all rows": 1}  # tensors of rows times vocabulary, by way
AGREE = 1e-3  # relative difference of losses and projections; 30 times that in bfloat16


class Problem(NamedTuple):
    """Inputs of a cell."""

    divergence: str
    states: Tensor
    head: Tensor
    hidden: Tensor
    weight: Tensor

    @property
    def chunk(self) -> int:
        return chunk_rows(self.states.device, len(self.head), len(self.states))


def problem(divergence: str, rows: int, vocab: int, width: int, dtype: str, device: str = "cpu") -> Problem:
    torch.manual_seed(0)
    sizes = [rows, vocab, rows, vocab]
    drawn = [torch.randn(size, width, dtype=getattr(torch, dtype), device=device) for size in sizes]
    for weight in (drawn[1], drawn[3]):
        weight.mul_(width**-0.5)
    return Problem(divergence, drawn[0].requires_grad_(), drawn[1].requires_grad_(), *drawn[2:])


# ---- ways to compute it: each returns the loss and leaves the gradients in states and head -----------------------


def two_heads(p: Problem, rows: str) -> Tensor:
    """Compute the rows by "form" (on a GPU by its kernel), by its "pytorch" operations, or by "autograd"."""
    form = closed_form(p.divergence)
    ways = {"form": form, "pytorch": ClosedForm(form.function), "autograd": get_divergence(p.divergence)}
    divergence = ways[rows]
    values, _ = two_head_loss(p.states, p.head, HeadTarget(p.hidden, p.weight), divergence)
    loss = values.mean()
    loss.backward()
    return loss.detach()


def naive(p: Problem) -> Tensor:
    log_p, log_q = log_softmax(F.linear(p.hidden, p.weight)), log_softmax(F.linear(p.states, p.head))
    loss = get_divergence(p.divergence)(log_p, log_q).mean()
    loss.backward()
    return loss.detach()


def compiled(p: Problem) -> Tensor:
    """Chunks of rows through `torch.compile`, each with its own backward pass."""
    divergence = get_divergence(p.divergence)

    @torch.compile
    def part(states: Tensor, head: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
        log_p, log_q = log_softmax(F.linear(hidden, weight)), log_softmax(F.linear(states, head))
        return divergence(log_p, log_q).sum()

    total = torch.zeros((), device=p.states.device)
    for states, hidden in zip(p.states.split(p.chunk), p.hidden.split(p.chunk), strict=True):
        loss = part(states, p.head, hidden, p.weight) / len(p.states)
        loss.backward()
        total += loss.detach()
    return total


def linear_cross_entropy(p: Problem) -> Tensor:
    """PyTorch's own chunks, after the target's choices are made chunk by chunk."""
    with torch.no_grad():
        choices = torch.cat([F.linear(hidden, p.weight).argmax(-1) for hidden in p.hidden.split(p.chunk)])
    loss = F.linear_cross_entropy(p.states, p.head, choices, options=torch.nn.LinearCrossEntropyOptions())
    loss.backward()
    return loss.detach()


def products(p: Problem, chunk: int) -> Tensor:
    """The four matrix products, whose results are right in shape only."""
    states, head = p.states.detach(), p.head.detach()
    logits, gradient, summed = states.new_empty(chunk, len(head)), torch.empty_like(states), torch.zeros_like(head)
    for start in range(0, len(states), chunk):
        rows = slice(start, start + chunk)
        out = logits[: len(states[rows])]
        torch.mm(p.hidden[rows], p.weight.T, out=out)
        torch.mm(states[rows], head.T, out=out)
        torch.mm(out, head, out=gradient[rows])
        summed.addmm_(out.T, states[rows])
    return torch.zeros(())


WAYS: dict[str, Callable[[Problem], Tensor]] = {
    "products in chunks": lambda p: products(p, p.chunk),
    "products of all rows": lambda p: products(p, len(p.states)),
    "two_head_loss": partial(two_heads, rows="form"),
    "two_head_loss, no kernel": partial(two_heads, rows="pytorch"),
    "two_head_loss, any function": partial(two_heads, rows="autograd"),
    "naive": naive,
    "compiled chunks": compiled,
    "linear_cross_entropy": linear_cross_entropy,
}


# ---- measuring ---------------------------------------------------------------------------------------------------


def memory(name: str, file: Path = STATUS) -> float | None:
    """A figure of this process in MiB, such as VmRSS, or VmHWM since it was cleared; None where there is none."""
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def measure(way: str, p: Problem, repeats: int) -> dict[str, Any]:
    """Time and peak memory of a way, and what it computed."""
    run, learned, cuda = WAYS[way], [p.states, p.head], p.states.is_cuda

    def once() -> float:
        p.states.grad = p.head.grad = None
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        run(p)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - began

    p.states.grad = p.head.grad = None
    found = [float(run(p))]  # compiles, and fills the caches of the matrix kernels
    if p.head.grad is not None:
        direction = torch.Generator().manual_seed(1)
        found += [float((x.grad.float().cpu() * torch.randn(x.shape, generator=direction)).sum()) for x in learned]
    p.states.grad = p.head.grad = None
    if CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to count as there before
        CLEAR.write_text("5")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20 if cuda else memory("VmRSS")
    seconds = [once()]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else memory("VmHWM")
    seconds += [once() for _ in range(repeats - 1)]
    gradients = sum(x.numel() * x.element_size() for x in learned) / 2**20
    above = None if peak is None or before is None else round(peak - before - gradients, 1)
    return {"ms": round(1000 * statistics.median(seconds), 2), "peak_mib": above, "found": found}


def agree(ways: dict[str, dict[str, Any]], tolerance: float) -> bool:
    """Whether all ways that compute the loss found the same."""
    found = [way["found"] for way in ways.values() if len(way["found"]) > 1]
    return all(
        abs(a - b) <= tolerance * max(1.0, abs(b)) for each in found for a, b in zip(each, found[0], strict=True)
    )


def ways_of(divergence: str, device: str = "cpu", compiling: bool = True) -> list[str]:
    without = {"linear_cross_entropy"} if divergence != "cross_entropy" else set()
    without |= set() if device.startswith("cuda") else {"two_head_loss, no kernel"}  # a CPU has none
    without |= set() if compiling else {"compiled chunks"}
    return [way for way in WAYS if way not in without]


def in_process(way: str, cell: tuple[str, int, int], options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure a way, or return None if its logits would not fit into memory."""
    divergence, rows, vocab = cell
    needed, free = WHOLE.get(way, 0) * rows * vocab * 4, memory("MemAvailable", MEMINFO)
    if options.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(options.device)[0] / 2**20
    if free is not None and needed > free * 2**20:
        return None
    arguments = [f"--rows={rows}", f"--vocabs={vocab}", f"--divergences={divergence}", f"--width={options.width}"]
    arguments += [f"--dtype={options.dtype}", f"--threads={options.threads}", f"--repeats={options.repeats}"]
    arguments += [f"--device={options.device}"]
    command = [sys.executable, __file__, f"--way={way}", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="256,1024,4096,8192")
    parser.add_argument("--vocabs", default="8192,32768,152064")
    parser.add_argument("--divergences", default="forward_kl,cross_entropy")
    parser.add_argument("--width", type=int, default=576, help="hidden size of drafter and target")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes a minute a cell"
    )
    parser.add_argument("--way", choices=WAYS, help="measure this way of the first cell, in this process")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cells = [
        (divergence, int(rows), int(vocab))
        for divergence in options.divergences.split(",")
        for vocab in options.vocabs.split(",")
        for rows in options.rows.split(",")
    ]
    if options.way:
        first = problem(*cells[0], options.width, options.dtype, options.device)
        print(json.dumps(measure(options.way, first, options.repeats)))
        return
    results = []
    for cell in cells:
        found_by = {
            way: in_process(way, cell, options) for way in ways_of(cell[0], options.device, not options.no_compile)
        }
        ways = {way: found for way, found in found_by.items() if found is not None}
        agreed = agree(ways, AGREE * (1 if options.dtype == "float32" else 30))
        floor = min(ways[way]["ms"] for way in ways if way.startswith("products"))
        print(f"\n{cell[0]}, {cell[1]} rows, vocabulary {cell[2]}" + ("" if agreed else ": RESULTS DIFFER"))
        for way, found in ways.items():
            found["over_products"] = round(found["ms"] / floor, 2)
            print(
                f"  {way:30} {found['ms']:10.1f} ms {found['over_products']:6.2f}x {found['peak_mib']} MiB", flush=True
            )
        too_large = [way for way in found_by if way not in ways]
        cell_result = {"divergence": cell[0], "rows": cell[1], "vocab": cell[2], "agree": agreed, "ways": ways}
        results.append({**cell_result, "too_large_for_memory": too_large})
    figures = {key: getattr(options, key) for key in ("width", "dtype", "threads", "repeats", "device")}
    write_result(__file__, options, {**figures, "cells": results})


if __name__ == "__main__":
    main()

"""The two-head drafter loss against its matrix products alone and against other ways to compute it: time and memory.

Each measurement is a forward and a backward pass with gradients in states and head, in a process of its own. Memory is
the peak above inputs and gradients. All ways of a cell must agree on the loss and on a projection of its gradients.

    python benchmarks/kernels.py --quick --threads 2                    # the headline cells
    python benchmarks/kernels.py --quick --cpu-time                     # on a CPU that is shared with others
    python benchmarks/kernels.py --threads 2                            # every cell
    python benchmarks/kernels.py --device cuda --dtype bfloat16 --width 4096 --rows 1024,8192 --vocabs 32768,152064

A run that was interrupted goes on where it stopped: what it measured is kept in NAME.partial.jsonl until the result is
written.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
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
ENOUGH = 4.0  # seconds of passes after which a way is not repeated
# Ways that do the whole work otherwise: `two_head_loss` is compared with the best of them.
PEERS = ("naive", "compiled chunks", "linear_cross_entropy", "Liger")


class Cell(NamedTuple):
    """What is computed, and at which size."""

    divergence: str
    rows: int
    vocab: int


# The quick table; the cross entropy, for its own peer, at two sizes.
QUICK = [Cell("forward_kl", rows, vocab) for vocab in (8192, 32768, 152064) for rows in (256, 1024, 8192)]
QUICK += [Cell("cross_entropy", 1024, vocab) for vocab in (8192, 32768)]
LARGEST_COMPILED = 2**28  # logits of a cell up to which the quick table compiles a peer


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


def problem(cell: Cell, width: int, dtype: str, device: str = "cpu") -> Problem:
    torch.manual_seed(0)
    sizes = [cell.rows, cell.vocab] * 2
    drawn = [torch.randn(size, width, dtype=getattr(torch, dtype), device=device) for size in sizes]
    for weight in (drawn[1], drawn[3]):
        weight.mul_(width**-0.5)
    return Problem(cell.divergence, drawn[0].requires_grad_(), drawn[1].requires_grad_(), *drawn[2:])


# ---- ways to compute it: each returns the loss and leaves the gradients in states and head -----------------------


def two_heads(p: Problem, rows: str) -> Tensor:
    """Compute the rows by "form" (on a GPU by its kernel), by its "pytorch" operations, or by "autograd"."""
    form = closed_form(p.divergence)
    ways = {"form": form, "pytorch": ClosedForm(form.function), "autograd": get_divergence(p.divergence)}
    values, _ = two_head_loss(p.states, p.head, HeadTarget(p.hidden, p.weight), ways[rows])
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


def liger(p: Problem) -> Tensor:
    """Liger's divergence through both heads, which at beta 0 is the forward KL."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0)(p.states, p.head, p.hidden, p.weight, None)
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
    "Liger": liger,
}


def left_out(cell: Cell, device: str = "cpu", compiling: bool = True, quick: bool = False) -> dict[str, str]:
    """Ways that a cell is not computed by, and why."""
    reasons, on_gpu = {}, device.startswith("cuda")
    if cell.divergence != "cross_entropy":
        reasons["linear_cross_entropy"] = "computes the cross entropy only"
    if cell.divergence != "forward_kl" or not on_gpu or not importlib.util.find_spec("liger_kernel"):
        reasons["Liger"] = "computes the forward KL, on a GPU, where liger-kernel is installed"
    if not on_gpu:
        reasons["two_head_loss, no kernel"] = "has no kernel on a CPU"
    if not compiling or quick and cell.rows * cell.vocab > LARGEST_COMPILED:
        reasons["compiled chunks"] = "takes a minute to compile"
    if quick:
        reasons["two_head_loss, any function"] = "is in the full table"
    return reasons


# ---- measuring ---------------------------------------------------------------------------------------------------


def memory(name: str, file: Path = STATUS) -> float | None:
    """A figure of this process in MiB, such as VmRSS, or VmHWM since it was cleared; None where there is none."""
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:")), None)


def forget_peak() -> None:
    """Let VmHWM count from now on, where the system can."""
    if CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is not to count as there before
        CLEAR.write_text("5")


def measure(way: str, p: Problem, repeats: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Time and peak memory of a way, and what it computed."""
    run, learned, cuda = WAYS[way], [p.states, p.head], p.states.is_cuda

    def once() -> float:
        p.states.grad = p.head.grad = None
        if cuda:
            torch.cuda.synchronize()
        began = clock()
        run(p)
        if cuda:
            torch.cuda.synchronize()
        return clock() - began

    p.states.grad = p.head.grad = None
    found = [float(run(p))]  # compiles, and fills the caches of the matrix kernels
    if p.head.grad is not None:
        direction = torch.Generator().manual_seed(1)
        found += [float((x.grad.float().cpu() * torch.randn(x.shape, generator=direction)).sum()) for x in learned]
    p.states.grad = p.head.grad = None
    forget_peak()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() / 2**20 if cuda else memory("VmRSS")
    seconds = [once()]
    peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else memory("VmHWM")
    while len(seconds) < repeats and sum(seconds) < ENOUGH:
        seconds.append(once())
    gradients = sum(x.numel() * x.element_size() for x in learned) / 2**20
    above = None if peak is None or before is None else round(peak - before - gradients, 1)
    return {"ms": round(1000 * statistics.median(seconds), 2), "peak_mib": above, "found": found}


def agree(ways: dict[str, dict[str, Any]], tolerance: float) -> bool:
    """Whether all ways that compute the loss found the same."""
    found = [way["found"] for way in ways.values() if len(way["found"]) > 1]
    return all(
        abs(a - b) <= tolerance * max(1.0, abs(b)) for each in found for a, b in zip(each, found[0], strict=True)
    )


def in_process(way: str, cell: Cell, options: argparse.Namespace) -> dict[str, Any] | None:
    """Measure a way, or return None if its logits would not fit into memory."""
    needed, free = WHOLE.get(way, 0) * cell.rows * cell.vocab * 4, memory("MemAvailable", MEMINFO)
    if options.device.startswith("cuda"):
        free = torch.cuda.mem_get_info(options.device)[0] / 2**20
    if free is not None and needed > free * 2**20:
        return None
    arguments = [f"--{name}={getattr(options, name)}" for name in ("width", "dtype", "threads", "repeats", "device")]
    arguments += ["--cpu-time"] * options.cpu_time
    arguments += [f"--divergences={cell.divergence}", f"--rows={cell.rows}", f"--vocabs={cell.vocab}"]
    command = [sys.executable, __file__, f"--way={way}", *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


class Journal:
    """Measurements of a run that is not finished, one a line, which a run with the same settings takes over.

    Args:
        path: Its file.
        settings: What measurements depend on besides their cell and way.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.measured = path, {}
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else [settings]
        if lines[0] != settings:
            raise SystemExit(
                f"{path} is of a run with {lines[0]}, and this one has {settings}; delete it or finish that"
            )
        for line in lines[1:]:
            self.measured[Cell(*line["cell"]), line["way"]] = line["found"]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._write(settings)

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def take(self, cell: Cell, way: str, measuring: Callable[[], dict[str, Any] | None]) -> dict[str, Any] | None:
        """Return what was measured, or measure it and note that. What does not fit into memory is tried again."""
        if (cell, way) not in self.measured:
            found = measuring()
            if found is None:
                return None
            self.measured[cell, way] = found
            self._write({"cell": cell, "way": way, "found": found})
        return self.measured[cell, way]


# ---- the table ---------------------------------------------------------------------------------------------------


def summary(ways: dict[str, dict[str, Any]]) -> dict[str, float | str | None]:
    """What the cell says of `two_head_loss`: its time over the products', its gain, and its share of naive's memory."""
    fused, naive_peak = ways["two_head_loss"], ways.get("naive", {}).get("peak_mib")
    floor = min(way["ms"] for name, way in ways.items() if name.startswith("products"))
    peers = {name: way["ms"] for name, way in ways.items() if name in PEERS}
    best = min(peers, key=peers.__getitem__, default=None)
    return {
        "over_products": round(fused["ms"] / floor, 2),
        "best_peer": best,
        "faster_than_best_peer": None if best is None else round(peers[best] / fused["ms"], 2),
        "share_of_naive_peak": round(fused["peak_mib"] / naive_peak, 3) if fused["peak_mib"] and naive_peak else None,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The page's table, in Markdown."""
    head = "divergence | rows | vocabulary | ms | over the products | best peer | faster than it | peak, MiB | of naive"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for cell in cells:
        fused, says = cell["ways"]["two_head_loss"], cell["summary"]
        figures = [cell["divergence"], cell["rows"], cell["vocab"], fused["ms"], says["over_products"]]
        figures += [says["best_peer"], says["faster_than_best_peer"], fused["peak_mib"], says["share_of_naive_peak"]]
        lines.append("| " + " | ".join("" if figure is None else str(figure) for figure in figures) + " |")
    return "\n".join(lines)


def cell_result(cell: Cell, journal: Journal, options: argparse.Namespace) -> dict[str, Any]:
    """Measure a cell by all its ways."""
    reasons = left_out(cell, options.device, not options.no_compile, options.quick)
    ways: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        if way in reasons:
            continue
        found = journal.take(cell, way, lambda way=way: in_process(way, cell, options))
        if found is None:
            reasons[way] = "does not fit into memory"
        else:
            ways[way] = found
    agreed, says = agree(ways, AGREE * (1 if options.dtype == "float32" else 30)), summary(ways)
    print(f"\n{cell.divergence}, {cell.rows} rows, vocabulary {cell.vocab}" + ("" if agreed else ": RESULTS DIFFER"))
    for way, found in ways.items():
        print(f"  {way:30} {found['ms']:10.1f} ms {found['peak_mib']} MiB")
    print(f"  {says}", flush=True)
    return {**cell._asdict(), "agree": agreed, "summary": says, "ways": ways, "left_out": reasons}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="256,1024,4096,8192")
    parser.add_argument("--vocabs", default="8192,32768,152064")
    parser.add_argument("--divergences", default="forward_kl,cross_entropy")
    parser.add_argument("--quick", action="store_true", help="the headline cells in place of rows times vocabularies")
    parser.add_argument("--width", type=int, default=576, help="hidden size of drafter and target")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="passes of a way, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU time of the process, all threads, in place of wall time"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes a minute a cell"
    )
    parser.add_argument("--way", choices=WAYS, help="measure this way of the first cell, in this process")
    parser.add_argument("--name", help="name of the result file")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cells = [
        Cell(divergence, int(rows), int(vocab))
        for divergence in options.divergences.split(",")
        for vocab in options.vocabs.split(",")
        for rows in options.rows.split(",")
    ]
    if options.way:
        first = problem(cells[0], options.width, options.dtype, options.device)
        clock = time.process_time if options.cpu_time else time.perf_counter
        print(json.dumps(measure(options.way, first, options.repeats, clock)))
        return
    settings = {key: getattr(options, key) for key in ("width", "dtype", "threads", "repeats", "device", "cpu_time")}
    journal = Journal(options.out / f"{options.name or 'kernels'}.partial.jsonl", settings)
    results = [cell_result(cell, journal, options) for cell in (QUICK if options.quick else cells)]
    write_result(__file__, options, {**settings, "cells": results})
    journal.path.unlink()
    print(table(results))


if __name__ == "__main__":
    main()

"""Scoring recorded trees with gradients: one pass a depth over the packed batch, against one row for every path.

The second is what a trainer without tree attention does: each root-to-leaf path becomes a sequence of its own, with its
own copy of the text before it. Both go through `Drafter.score`, so that only the layout differs. Every cell runs in a
process of its own, for its peak memory. Packed is the best of three passes; of the rows, which take minutes, there is
one pass, and their peak is that of chunks of sixteen.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from common import arguments, parse, write_result
from tensordict import TensorDict
from transformers import LlamaConfig

from aurora_rl.policies import Eagle3Drafter
from aurora_rl.sampling_params import SamplingParams
from aurora_rl.trajectories import make_trajectory, pack

# SmolLM2-135M's sizes.
CONFIG = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    vocab_size=49152, max_position_embeddings=8192, num_hidden_layers=1,
)  # fmt: skip
DRAFT_VOCAB, STRIDE, CHUNK = 4096, 16, 16


def trajectory(sequence: int, parents: list[int], anchors: list[int]) -> TensorDict:
    """Random tokens and features; the same tree at every anchor."""
    count, hidden = len(parents), CONFIG.hidden_size
    prompt, versions = min(anchors) + 1, [0] * len(anchors)
    trees = [
        {
            "tokens": torch.randint(DRAFT_VOCAB, (count,)),
            "parents": torch.tensor(parents),
            "log_probs": torch.zeros(count),
            "accepted": torch.zeros(count, dtype=torch.bool),
            "hidden": torch.zeros(count, 1),
        }
        for _ in anchors
    ]
    return make_trajectory(
        request=0,
        tokens=torch.randint(DRAFT_VOCAB, (sequence,)),
        prompt_length=prompt,
        features=torch.randn(sequence - 1, 3 * hidden),
        target={"hidden": torch.zeros(sequence - prompt, 1)},
        anchors=anchors,
        trees=trees,
        policy_versions=versions,
        cache_versions=versions,
        sampling_params=SamplingParams(),
    )


def tree(nodes: int) -> list[int]:
    """Depth-first: chains of up to four nodes, two to a fork, as a beam of width two leaves them."""
    parents: list[int] = []
    while len(parents) < nodes:
        above = -1
        for _ in range(min(4, nodes - len(parents))):
            parents.append(above)
            above = len(parents) - 1
    return parents


def paths(whole: TensorDict) -> list[TensorDict]:
    """Every root-to-leaf path as a trajectory of its own."""
    out = []
    offset, every = whole["rounds", "offset"].tolist(), whole["nodes", "parents"].tolist()
    for index, anchor in enumerate(whole["rounds", "anchor"].tolist()):
        parents = every[offset[index] : offset[index + 1]]
        for leaf in set(range(len(parents))) - set(parents):
            path = [leaf]
            while parents[path[0]] >= 0:
                path.insert(0, parents[path[0]])
            row = trajectory(anchor + 2, list(range(-1, len(path) - 1)), [anchor])
            row["sequence", "tokens"] = whole["sequence", "tokens"][: anchor + 2]
            row["sequence", "features"] = whole["sequence", "features"][: anchor + 1]
            row["nodes", "tokens"] = whole["nodes", "tokens"][[offset[index] + n for n in path]]
            out.append(row)
    return out


def cell(method: str, sequence: int, nodes: int, device: str, threads: int) -> dict:
    """Seconds of forward and backward, and peak memory, of one method."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    drafter = Eagle3Drafter(
        CONFIG, embedding=torch.randn(CONFIG.vocab_size, CONFIG.hidden_size),
        draft_vocab=torch.arange(DRAFT_VOCAB), feature_layers=(0, 1, 2),
    ).to(device)  # fmt: skip
    whole = trajectory(sequence, tree(nodes), list(range(sequence // 2, sequence - 1, STRIDE)))
    rows = [whole] if method == "packed" else paths(whole)
    batches = [pack(rows[i : i + CHUNK]).to(device) for i in range(0, len(rows), CHUNK)]

    def step() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        for batch in batches:
            drafter.score(batch).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    first_rows = pack(rows[:1]).to(device) if method == "paths" else None
    if first_rows is not None:
        drafter.score(first_rows).sum().backward()  # load what is loaded once
    before = peak()
    seconds = min(step() for _ in range(3 if method == "packed" else 1))
    return {
        "method": method, "sequence": sequence, "trees": len(whole["rounds", "anchor"]), "nodes": nodes,
        "rows": len(rows),
        "seconds": round(seconds, 4), "peak_mib_above_start": round(peak() - before),
    }  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", default="512,2048")
    parser.add_argument("--nodes", default="8,16,64")
    parser.add_argument("--cell", nargs=3, help=argparse.SUPPRESS)
    options = parse(parser)
    if options.cell:
        method, sequence, nodes = options.cell
        print(json.dumps(cell(method, int(sequence), int(nodes), options.device, options.threads)))
        return
    cells = []
    for sequence in options.sequences.split(","):
        for nodes in options.nodes.split(","):
            for method in ("packed", "paths"):
                own = ["--cell", method, sequence, nodes, "--device", options.device, "--threads", str(options.threads)]
                done = subprocess.run([sys.executable, __file__, *own], capture_output=True, text=True, check=True)
                cells.append(json.loads(done.stdout.splitlines()[-1]))
                print(cells[-1], flush=True)
            packed, rows = cells[-2:]
            packed["speedup"] = round(rows["seconds"] / packed["seconds"], 1)
    write_result(__file__, options, {"threads": options.threads, "chunk_of_rows": CHUNK, "cells": cells})


if __name__ == "__main__":
    main()

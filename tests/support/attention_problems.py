"""Problems of tree attention, ways to solve them, and the solution query by query in float64."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora_kernels import TreeMask, tree_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel(query: Tensor, key: Tensor, value: Tensor, mask: TreeMask, splits: int | None = 3, **terms: Any) -> Tensor:
    pytest.importorskip("triton")
    from aurora_kernels.tree_attention_triton import attend

    query, key, value = (part.to(DEVICE) for part in (query, key, value))
    moved = TreeMask(*(None if part is None else part.to(DEVICE) for part in (mask.prefix, mask.seen, mask.first)))
    arguments = [terms.get(name) for name in ("softcap", "sinks", "block_table")]
    softcap, sinks, table = (part.to(DEVICE) if isinstance(part, Tensor) else part for part in arguments)
    scale = terms.get("scale") or query.shape[-1] ** -0.5
    return attend(query, key, value, moved, scale, softcap, sinks, table, splits=splits).cpu()


def in_parts(*args: Any, **terms: Any) -> Tensor:
    """The form of a CPU for many rows and columns: the text without a mask of rows."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys.modules[tree_attention.__module__], "_BIAS", 0)
        return tree_attention(*args, **terms)


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: TreeMask,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of each query of each head by itself, in float64; 0 where all scores are −inf."""
    b, heads, length, d = query.shape
    out = torch.zeros(b, heads, length, value.shape[-1], dtype=torch.float64)
    for slot in range(b):
        prefix = int(mask.prefix[slot])
        for row in range(length):
            first = 0 if mask.first is None else int(mask.first[slot, row])
            nodes = range(row + 1) if mask.seen is None else mask.seen[slot, row].nonzero()[:, 0].tolist()
            columns = [*range(first, prefix), *(prefix + node for node in nodes)]
            for head in range(heads):
                k, v = (part[slot, head * key.shape[1] // heads, columns].double() for part in (key, value))
                scores = k @ query[slot, head, row].double() * (d**-0.5 if scale is None else scale)
                scores = scores if softcap is None else softcap * (scores / softcap).tanh()
                nothing = torch.tensor([-math.inf if sinks is None else float(sinks[head])], dtype=torch.float64)
                scores = torch.cat([scores, nothing])
                weights = torch.where((scores == -math.inf).all(), 0.0, scores.softmax(0))
                there = scores[:-1] != -math.inf
                out[slot, head, row] = weights[:-1][there] @ v[there]
    return out


def random_trees(slots: int, nodes: int) -> Tensor:
    """Ancestors of the nodes of random trees, themselves included, ``[b, N + 1, N + 1]``; the root is node 0."""
    seen = torch.eye(nodes + 1).bool().repeat(slots, 1, 1)
    for slot in range(slots):
        for node in range(1, nodes + 1):
            seen[slot, node] |= seen[slot, int(torch.randint(node, ()))]
    return seen


def problem(
    prefixes: list[int], nodes: int, heads: int = 4, groups: int = 2, d: int = 16, dv: int | None = None
) -> tuple[Tensor, Tensor, Tensor, TreeMask]:
    """Queries, keys and values with junk after each slot's tree, and a mask of random trees."""
    b, columns = len(prefixes), max(prefixes) + nodes + 3
    query = torch.randn(b, heads, nodes + 1, d)
    # As a cache has them: columns before heads.
    key = torch.randn(b, columns, groups, d).transpose(1, 2)
    value = torch.randn(b, columns, groups, d if dv is None else dv).transpose(1, 2)
    return query, key, value, TreeMask(torch.tensor(prefixes), random_trees(b, nodes))


def assert_same(out: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)

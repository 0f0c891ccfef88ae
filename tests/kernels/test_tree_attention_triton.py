"""What the kernel alone does: ranges of columns and blocks of rows; test_tree_attention.py has the rest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_problems import assert_same, kernel, problem, reference

from aurora_kernels import TreeMask


@pytest.mark.parametrize("splits", [1, 2, 3])
def test_ranges_of_columns_add_up(splits: int) -> None:
    query, key, value, mask = problem([260, 3, 126], 5)
    first = torch.tensor([200, 0, 120])[:, None].repeat(1, 6)
    for each in (mask, TreeMask(mask.prefix), TreeMask(mask.prefix, mask.seen, first)):
        sinks = torch.randn(4)
        out = kernel(query, key, value, each, splits=splits, sinks=sinks)
        assert_same(out, reference(query, key, value, each, sinks=sinks))


def test_more_rows_than_a_block() -> None:
    query, key, value, mask = problem([30], 64, heads=6, groups=2)
    assert_same(kernel(query, key, value, mask), reference(query, key, value, mask))


@pytest.mark.parametrize("nodes", [64, 130])
def test_trees_of_more_nodes_than_a_word_has_bits(nodes: int) -> None:
    query, key, value, mask = problem([9, 2], nodes, heads=2, groups=1, d=16)
    assert mask.words.shape == (2, nodes + 1, nodes // 64 + 1)
    assert_same(kernel(query, key, value, mask, splits=2), reference(query, key, value, mask))


@pytest.mark.parametrize("shared", [49152, 101376, 232448])
@pytest.mark.parametrize("row_bytes", [64, 256, 512, 1024])
def test_rows_keys_and_values_fit_into_shared_memory(row_bytes: int, shared: int) -> None:
    pytest.importorskip("triton")
    from aurora_kernels.tree_attention_triton import row_block

    columns = min(max(2**14 // row_bytes, 16), 128)
    rows = row_block(1000, row_bytes, columns, shared)
    assert rows == 16 or (rows + 4 * columns) * row_bytes <= shared
    assert rows == 128 or (2 * rows + 4 * columns) * row_bytes > shared
    assert row_block(5, row_bytes, columns, shared) == 16


COMPILE = """
import sys, types, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from aurora_kernels import TreeMask, tree_attention_triton as module

for capability, shared, dtype, d in ((89, 101376, "bfloat16", 256), (90, 232448, "bfloat16", 128)):
    target, used = GPUTarget("cuda", capability, 32), []
    triton.runtime.driver.set_active(types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: capability, get_current_stream=lambda device: 0
    ))
    module._shared_memory = lambda device: shared
    # In place of a launch.
    JITFunction.__getitem__ = lambda self, grid: lambda *args, **more: used.append(
        self.run(*args, grid=grid, warmup=True, **more).metadata.shared
    )
    query = torch.zeros(1, 8, 64, d, dtype=getattr(torch, dtype))
    key = torch.zeros(1, 2, 600, d, dtype=getattr(torch, dtype))
    mask = TreeMask(torch.tensor([500]), torch.ones(1, 64, 64, dtype=torch.bool))
    module.attend(query, key, key, mask, 0.1, None, None, None, splits=2)
    assert len(used) == 2 and max(used) <= shared, (capability, dtype, d, used)
    print(capability, dtype, d, used)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has NVIDIA's assembler on Linux only")
def test_it_compiles_for_gpus_of_less_shared_memory_too(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2

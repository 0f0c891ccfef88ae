"""What the kernel alone does: ranges of columns and blocks of rows; test_tree_attention.py has the rest."""

from __future__ import annotations

import ast
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

def attend_to_random_trees():
    # The forms of both kernels that 50 trees of up to 64 nodes need.
    forms, compile = {}, JITFunction._do_compile
    JITFunction._do_compile = lambda self, key, *args: forms.setdefault(self.fn.__name__, set()).add(key) or object()
    prepare(90, 232448, None)
    key = torch.zeros(4, 2, 2048, 64, dtype=torch.bfloat16)
    for tree in range(50):
        slots, nodes = 1 + tree % 4, int(torch.randint(1, 65, ()))
        mask = TreeMask(torch.randint(1900, (slots,)), torch.rand(slots, nodes, nodes) < 0.5)
        query = torch.zeros(slots, 8, nodes, 64, dtype=torch.bfloat16)
        module.attend(query, key[:slots], key[:slots], mask, 0.1, None, None, None, splits=2)
    JITFunction._do_compile = compile
    for function in (module._attend_kernel, module._merge_kernel):
        function.device_caches.clear()
    return {name: len(keys) for name, keys in forms.items()}


def prepare(capability, shared, used):
    # Say that a GPU is there, and compile in place of a launch.
    target = GPUTarget("cuda", capability, 32)
    triton.runtime.driver.set_active(types.SimpleNamespace(
        get_current_target=lambda: target, get_current_device=lambda: capability, get_current_stream=lambda device: 0
    ))
    module._shared_memory = lambda device: shared

    def launch(self, grid):
        def run(*args, **more):
            kernel = self.run(*args, grid=grid, warmup=True, **more)
            if used is not None:
                used.append(kernel.metadata.shared)
        return run

    JITFunction.__getitem__ = launch


print(attend_to_random_trees())
for capability, shared, dtype, d in ((89, 101376, "bfloat16", 256), (90, 232448, "bfloat16", 128)):
    used = []
    prepare(capability, shared, used)
    query = torch.zeros(1, 8, 64, d, dtype=getattr(torch, dtype))
    key = torch.zeros(1, 2, 600, d, dtype=getattr(torch, dtype))
    mask = TreeMask(torch.tensor([500]), torch.ones(1, 64, 64, dtype=torch.bool))
    module.attend(query, key, key, mask, 0.1, None, None, None, splits=2)
    assert len(used) == 2 and max(used) <= shared, (capability, dtype, d, used)
    print(capability, dtype, d, used)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has NVIDIA's assembler on Linux only")
def test_it_compiles_for_gpus_of_less_shared_memory_too_and_seldom_anew(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    forms, *compiled = result.stdout.splitlines()
    assert len(compiled) == 2
    counts = ast.literal_eval(forms)
    assert counts["_attend_kernel"] <= 9 and counts["_merge_kernel"] == 1, counts

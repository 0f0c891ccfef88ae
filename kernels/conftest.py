"""Leaves modules that import triton out of the doctests where it is not installed."""

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else [
        "aurora_kernels/two_head_loss_triton.py",
        "aurora_kernels/tree_attention_triton.py",
    ]
)

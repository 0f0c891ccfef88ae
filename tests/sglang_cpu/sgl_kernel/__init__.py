"""Stands in for SGLang's compiled kernels on a CPU without AMX, so that SGLang itself runs there unpatched.

SGLang imports `sgl_kernel` on a CPU too, and the wheel on the Python index that brings it is built for CUDA. This one
is plain torch and has what a dense Llama with EAGLE-3, EAGLE or STANDALONE drafting reaches, chains and trees, under
the names and argument orders of SGLang 0.5.21. What it lacks fails by name, at import or at the call, never silently.
For tests and CPU benchmarks; never installed.
"""

from .attention import decode_attention_cpu, extend_attention_cpu, register_operators
from .slots import (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_draft_decode_metadata_cpu,
    copy_all_layer_kv_cache_cpu,
)
from .trees import (
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_draft_decode_metadata_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "decode_attention_cpu",
    "extend_attention_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
]

# SGLang calls attention as torch.ops.sgl_kernel.<name>. It must not find `convert_weight_packed` there: that is how it
# tells a CPU with AMX, for which it would expect the matrix kernels too.
OPERATORS = register_operators()

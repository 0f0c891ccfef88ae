"""Attention over the paged KV cache: one new token per request (decode), or several (prefill and verification).

Shapes: `t` rows of all requests together, `b` requests, `n` queries of one request, `S` tokens of the longest request,
`H` query heads, `G` KV heads, `D` head size. A request's tokens lie in the slots that its row of `req_to_token` names.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention_cpu(
    query: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    k_scale: float,
    v_scale: float,
    output: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    loc: Tensor,
    attn_logits: Tensor,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """Store each request's new key and value at `loc`, then attend from its one query `[b, H, D]` into `output`.

    `seq_lens` count the new token. `attn_logits` is room that the compiled kernel needs and this one does not.
    """
    _refuse(k_scale, v_scale, logit_cap, is_cross_attn, sliding_window, sinks)
    if key is not None and value is not None:
        k_buffer[loc] = key.view(-1, *k_buffer.shape[1:])
        v_buffer[loc] = value.view(-1, *v_buffer.shape[1:])
    slots, present = _slots(req_to_token, req_pool_indices, seq_lens)
    visible = None if present.all() else present[:, None]
    output.copy_(_attend(query[:, None], k_buffer, v_buffer, slots, visible, sm_scale)[:, 0])


def extend_attention_cpu(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    output: Tensor,
    k_buffer: Tensor,
    v_buffer: Tensor,
    k_scale: float,
    v_scale: float,
    req_to_token: Tensor,
    req_pool_indices: Tensor,
    seq_lens: Tensor,
    extend_seq_lens: Tensor,
    extend_start_loc: Tensor,
    max_len_extend: int,
    sm_scale: float,
    logit_cap: float,
    is_cross_attn: bool,
    sliding_window: int,
    encoder_lens: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """Attend from the last `extend_seq_lens` tokens of each request, `[t, H, D]`, over all its `seq_lens` tokens.

    The caller has stored the new keys and values already, so `key` and `value` are not read. New tokens see the
    prefix, and of each other what `tree_mask` says (each request's `[n, n]`, flat, one after the other), else the
    causal order.
    """
    _refuse(k_scale, v_scale, logit_cap, is_cross_attn, sliding_window, sinks)
    if not is_causal:
        raise NotImplementedError("the CPU stand-in of sgl_kernel has no bidirectional attention")
    lengths = extend_seq_lens.tolist()
    if len(set(lengths)) == 1:
        groups = [slice(0, len(lengths))]  # verification: all requests in one call
    else:
        groups = [slice(i, i + 1) for i, n in enumerate(lengths) if n]
    read = 0
    for group in groups:
        n, b, start = lengths[group.start], len(lengths[group]), int(extend_start_loc[group.start])
        rows = slice(start, start + b * n)
        slots, present = _slots(req_to_token, req_pool_indices[group], seq_lens[group])
        prefix = seq_lens[group] - n
        if tree_mask is None:
            own = torch.ones(n, n, dtype=torch.bool).tril().expand(b, n, n)
        else:
            own = tree_mask.view(-1)[read : read + b * n * n].view(b, n, n)
            read += b * n * n
        # The new tokens' columns are its last n, at another place in each request; everything before them is prefix.
        visible = present[:, None].repeat(1, n, 1)
        columns = (prefix[:, None, None] + torch.arange(n)).expand(b, n, n)
        visible.scatter_(2, columns, own)
        attended = _attend(query[rows].unflatten(0, (b, n)), k_buffer, v_buffer, slots, visible, sm_scale)
        output[rows] = attended.flatten(0, 1)


def register_operators() -> torch.library.Library:
    """Make both functions `torch.ops.sgl_kernel` operators, which last as long as what is returned."""
    library = torch.library.Library("sgl_kernel", "FRAGMENT")
    for function, mutated in (
        (decode_attention_cpu, ("k_buffer", "v_buffer", "output")),
        (extend_attention_cpu, ("output",)),
    ):
        library.define(function.__name__ + torch.library.infer_schema(function, mutates_args=mutated))
        library.impl(function.__name__, function, "CPU")
    return library


def _slots(req_to_token: Tensor, requests: Tensor, seq_lens: Tensor) -> tuple[Tensor, Tensor]:
    """The slots of each request's tokens and which of them are there, both `[b, S]`.

    After the end of a shorter request stands its own first slot: attention gives it the weight 0, and 0 times what
    an unwritten slot holds could still be NaN.
    """
    present = torch.arange(int(seq_lens.max())) < seq_lens[:, None]
    slots = req_to_token[requests, : present.shape[1]].long()
    return torch.where(present, slots, slots[:, :1]), present


def _attend(
    query: Tensor, k_buffer: Tensor, v_buffer: Tensor, slots: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """Attention of `query` `[b, n, H, D]` over `slots` `[b, S]`, of which query i sees `visible[:, i]`; None sees all.

    Query heads that share a KV head are laid side by side as more queries of that head. So keys and values are
    gathered once, in their own type; torch's `enable_gqa` repeats them, at bf16 and one query several times slower.
    """
    (b, n, heads, size), kv_heads = query.shape, k_buffer.shape[1]
    shared = heads // kv_heads
    query = query.view(b, n, kv_heads, shared, size).permute(0, 2, 3, 1, 4).reshape(b, kv_heads, shared * n, size)
    if visible is not None:
        visible = visible[:, None, None].expand(b, 1, shared, *visible.shape[1:]).flatten(2, 3)
    keys, values = (buffer.index_select(0, slots.view(-1)).unflatten(0, slots.shape) for buffer in (k_buffer, v_buffer))
    attended = F.scaled_dot_product_attention(
        query, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible, scale=scale
    )
    return attended.view(b, kv_heads, shared, n, -1).permute(0, 3, 1, 2, 4).reshape(b, n, heads, -1)


def _refuse(
    k_scale: float, v_scale: float, logit_cap: float, is_cross_attn: bool, sliding_window: int, sinks: Tensor | None
) -> None:
    """Stop at what other models than a dense Llama ask of these kernels, since ignoring it would be silently wrong."""
    asked = {
        "a scaled (8-bit) KV cache": k_scale != 1 or v_scale != 1,
        "a cap on logits": logit_cap > 0,
        "cross-attention": is_cross_attn,
        "a sliding window": sliding_window > 0,
        "attention sinks": sinks is not None,
    }
    if missing := [name for name, is_asked in asked.items() if is_asked]:
        raise NotImplementedError(f"the CPU stand-in of sgl_kernel does not have {' or '.join(missing)}")

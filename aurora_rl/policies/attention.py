"""Attention of tree nodes: to a shared sequence (or a cache of it) and to each node's own ancestors.

Legend: ``b`` rows, ``T`` queries, ``S`` sequence keys, ``J`` branch keys of a query, ``h`` heads, ``g`` key heads,
``d`` head size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

KeysValues = tuple[Tensor, Tensor]


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn ``[..., heads, d]`` by cosines and sines ``[..., d]``."""
    cos, sin = (part[..., None, :].to(x.dtype) for part in (cos, sin))
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# Most branch keys that go into one fused call, masked to each query's own. At serving a call's overhead counts; a
# training batch has thousands of keys, and no query should even look at those of the others.
_FOLD = 64


class TreeAttention(nn.Module):
    """Grouped-query attention with rotary positions, for drafters at serving and in training.

    A query sees the sequence keys that its mask allows, and its own branch keys: those of its ancestors and of itself.
    Serving a tree, unrolling chains and scoring recorded trees are all this one operation, so they agree.

    Args:
        config: Llama-style configuration, for heads, key heads, head size and rotary settings.
        input_size: Width of the input (EAGLE-3 reads embedding and feature, ``2 * hidden_size``).

    Example:
        >>> from transformers import LlamaConfig
        >>> config = LlamaConfig(hidden_size=8, num_attention_heads=2, num_key_value_heads=1, head_dim=4)
        >>> attention = TreeAttention(config, input_size=8)
        >>> x, position = torch.randn(1, 3, 8), torch.arange(3)[None]
        >>> sequence = attention.keys_values(x, position)
        >>> attention(x, position, sequence, torch.ones(1, 3, 3, dtype=torch.bool).tril()).shape
        torch.Size([1, 3, 8])
    """

    def __init__(self, config: LlamaConfig, *, input_size: int) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_key_heads = config.num_key_value_heads or config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.q_proj = nn.Linear(input_size, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(input_size, self.num_key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(input_size, self.num_key_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self._rotary = [LlamaRotaryEmbedding(config)]  # in a list: no submodule, so no buffers in checkpoints
        self._table: tuple[Tensor, Tensor] | None = None

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn ``[b, T, heads, d]`` to its positions ``[b, T]``."""
        longest = int(positions.max()) + 1
        if self._table is None or self._table[0].shape[0] < longest or self._table[0].device != x.device:
            # Twice what is needed: a growing request must not compute the table anew at every token.
            grid = torch.arange(max(2 * longest, 512), device=x.device)[None]
            cos, sin = self._rotary[0].to(x.device)(x.float(), grid)
            self._table = (cos[0], sin[0])
        return rotated(x, *(table[positions] for table in self._table))

    def keys_values(self, x: Tensor, positions: Tensor) -> KeysValues:
        """Return rotated keys and values ``[b, T, g, d]`` of inputs ``[b, T, input_size]`` at positions ``[b, T]``."""
        shape = (*x.shape[:2], self.num_key_heads, self.head_dim)
        return self._rotate(self.k_proj(x).view(shape), positions), self.v_proj(x).view(shape)

    def forward(
        self, x: Tensor, positions: Tensor, sequence: KeysValues, mask: Tensor, branch: KeysValues | None = None
    ) -> Tensor:
        """Attend from the nodes of trees.

        Args:
            x: Inputs, ``[b, T, input_size]``.
            positions: Position of each input, ``[b, T]`` int64.
            sequence: Keys and values, each ``[b, S, g, d]``.
            mask: Sequence keys that a query may see, ``[b, T, S]`` bool.
            branch: Keys and values of each query's ancestors and itself, all visible, each ``[b, T, J, g, d]``.

        Returns:
            ``[b, T, hidden_size]``.
        """
        b, length, _ = x.shape
        group = self.num_heads // self.num_key_heads
        q = self._rotate(self.q_proj(x).view(b, length, self.num_heads, self.head_dim), positions)
        q = q.view(b, length, self.num_key_heads, group, self.head_dim) * self.head_dim**-0.5
        if branch is None or length * branch[0].shape[2] <= _FOLD:
            out = self._fused(q, sequence, mask, branch)
        else:
            scores = torch.einsum("btgrd,bsgd->btgrs", q, sequence[0])
            scores = scores.masked_fill(~mask[:, :, None, None], torch.finfo(scores.dtype).min)
            to_own = torch.einsum("btgrd,btjgd->btgrj", q, branch[0])
            precise = torch.promote_types(q.dtype, torch.float32)
            weights = torch.cat([scores, to_own], dim=-1).softmax(dim=-1, dtype=precise).to(q.dtype)
            to_sequence, to_branch = weights.split([mask.shape[-1], to_own.shape[-1]], dim=-1)
            out = torch.einsum("btgrs,bsgd->btgrd", to_sequence, sequence[1])
            out = out + torch.einsum("btgrj,btjgd->btgrd", to_branch, branch[1])
        return self.o_proj(out.reshape(b, length, -1))

    def _fused(self, q: Tensor, sequence: KeysValues, mask: Tensor, branch: KeysValues | None) -> Tensor:
        """Attend from scaled ``q`` ``[b, T, g, h / g, d]`` in one fused call, branch keys masked to their queries."""
        b, length, heads, group, size = q.shape
        keys, values = sequence
        if branch is not None:
            keys, values = (torch.cat([s, own.flatten(1, 2)], dim=1) for s, own in zip(sequence, branch, strict=True))
            itself = torch.eye(length, dtype=torch.bool, device=q.device).repeat_interleave(branch[0].shape[2], dim=1)
            mask = torch.cat([mask, itself.expand(b, -1, -1)], dim=-1)
        # Queries of one group become rows of one key head, so keys are not repeated.
        rows = q.permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = F.scaled_dot_product_attention(
            rows, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=mask.repeat(1, group, 1)[:, None], scale=1.0
        )
        return out.view(b, heads, group, length, size).permute(0, 3, 1, 2, 4)

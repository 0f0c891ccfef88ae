"""A decoder layer over blocks of masks that reads the target's states as keys and values: what DFlash stacks.

Legend: ``r`` requests or slots, ``A`` anchors of each, ``W`` positions of a block, ``S`` context positions, ``g`` key
heads, ``d`` head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from aurora_rl.policies.attention import KeysValues, rotated

Rotation = tuple[Tensor, Tensor]


class BlockAttention(nn.Module):
    """Attention of blocks: each position sees the context that its anchor may see, and its whole block, both ways.

    Queries and keys are normalised per head, as in Qwen3. In training all anchors of a request share one context.
    """

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_heads = config.num_key_value_heads or heads
        self.group = heads // self.num_key_heads
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.num_key_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.num_key_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def keys_values(self, x: Tensor, rotation: Rotation) -> KeysValues:
        """Return rotated keys and values, each ``[..., g, d]``, of inputs ``[..., H]``."""
        keys, values = (project(x).unflatten(-1, (-1, self.head_dim)) for project in (self.k_proj, self.v_proj))
        return rotated(self.k_norm(keys), *rotation), values

    def forward(self, x: Tensor, rotation: Rotation, context: KeysValues, mask: Tensor) -> Tensor:
        """Attend from the positions of blocks.

        Args:
            x: Inputs, ``[r, A, W, H]``.
            rotation: Cosines and sines, each ``[r, A, W, d]``.
            context: Keys and values, each ``[r, S, g, d]``.
            mask: Context keys that the block of an anchor may see, ``[r, A, S]`` bool.

        Returns:
            ``[r, A, W, H]``.
        """
        anchors, width = x.shape[1:3]
        rows = width * self.group
        q = self.q_proj(x).unflatten(-1, (self.num_key_heads * self.group, self.head_dim))
        q = rotated(self.q_norm(q), *rotation) * self.head_dim**-0.5
        # Queries of a block and of a group become rows of one key head, so keys are not repeated.
        q = q.unflatten(3, (self.num_key_heads, self.group)).permute(0, 3, 1, 2, 4, 5).flatten(3, 4)
        keys, values = (part.permute(0, 3, 1, 2, 4) for part in self.keys_values(x, rotation))
        seen_keys, seen_values = (part.transpose(1, 2) for part in context)

        to_context = (q.flatten(2, 3) @ seen_keys.mT).unflatten(2, (anchors, rows))
        to_context = to_context.masked_fill(~mask[:, None, :, None], torch.finfo(q.dtype).min)
        scores = torch.cat([to_context, q @ keys.mT], dim=-1)
        weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
        to_context, to_block = weights.split([mask.shape[-1], width], dim=-1)
        out = (to_context.flatten(2, 3) @ seen_values).unflatten(2, (anchors, rows)) + to_block @ values
        return self.o_proj(out.unflatten(3, (width, self.group)).permute(0, 2, 3, 1, 4, 5).flatten(3))


class BlockLayer(nn.Module):
    """A Qwen3 decoder layer whose attention also reads the target's states, as keys and values."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = BlockAttention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, hidden: Tensor, rotation: Rotation, context: KeysValues, mask: Tensor) -> Tensor:
        """Map ``[r, A, W, H]`` to ``[r, A, W, H]``; the other arguments are those of :class:`BlockAttention`."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, context, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

"""TreeAttention against dense attention with repeated heads, one path at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from aurora_rl.policies.attention import TreeAttention


def build(heads: int = 4, key_heads: int = 2, head_dim: int = 4) -> tuple[TreeAttention, LlamaConfig]:
    config = LlamaConfig(
        hidden_size=2 * heads, num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=head_dim,
        max_position_embeddings=64,
    )  # fmt: skip
    return TreeAttention(config, input_size=5).double(), config


def dense(attention: TreeAttention, config: LlamaConfig, x: Tensor, positions: Tensor) -> Tensor:
    """Causal attention of one sequence ``[T, 5]``, as Llama writes it; returns the last row, ``[H]``."""
    heads, keys, d = attention.num_heads, attention.num_key_heads, attention.head_dim
    cos, sin = LlamaRotaryEmbedding(config)(x.float(), positions[None])
    q = attention.q_proj(x).view(1, -1, heads, d).transpose(1, 2)
    k = attention.k_proj(x).view(1, -1, keys, d).transpose(1, 2)
    v = attention.v_proj(x).view(1, -1, keys, d).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos.double(), sin.double())
    k, v = (part.repeat_interleave(heads // keys, dim=1) for part in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(d))[:, :, -1:]
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(1, -1)
    return attention.o_proj(out)[0]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 2), (4, 1)])
def test_sequence_attention_equals_dense_attention(heads: int, key_heads: int) -> None:
    attention, config = build(heads, key_heads)
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    positions = torch.arange(5).expand(2, 5) + torch.tensor([[0], [7]])
    mask = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 5, 5)
    out = attention(x, positions, attention.keys_values(x, positions), mask)
    for row in range(2):
        for t in range(5):
            torch.testing.assert_close(out[row, t], dense(attention, config, x[row, : t + 1], positions[row, : t + 1]))


# A sequence of 4 and the tree 0 -> (1, 2), 1 -> 3; paths from the root's child.
PARENTS = [-1, 0, 0, 1]
PATHS = [[0], [0, 1], [0, 2], [0, 1, 3]]


def tree(attention: TreeAttention, sequence: Tensor, nodes: Tensor) -> list[Tensor]:
    """The nodes' outputs, depth by depth, each with its ancestors' keys as its branch."""
    at = torch.arange(4)[None]
    committed = attention.keys_values(sequence[None], at)
    outputs = []
    for path in PATHS:
        own = attention.keys_values(nodes[path][None], torch.arange(4, 4 + len(path))[None])
        branch = (own[0][:, None], own[1][:, None])
        position = torch.tensor([[3 + len(path)]])
        mask = torch.ones(1, 1, 4, dtype=torch.bool)
        outputs.append(attention(nodes[path[-1:]][None], position, committed, mask, branch)[0, 0])
    return outputs


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (4, 1)])
def test_tree_attention_and_its_gradients_equal_each_path_alone(heads: int, key_heads: int) -> None:
    attention, config = build(heads, key_heads)
    sequence = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    nodes = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    inputs = (sequence, nodes, *attention.parameters())
    got = torch.stack(tree(attention, sequence, nodes))
    expected = torch.stack(
        [dense(attention, config, torch.cat([sequence, nodes[path]]), torch.arange(4 + len(path))) for path in PATHS]
    )
    torch.testing.assert_close(got, expected)
    weight = torch.randn_like(got)
    for gradient, slow in zip(
        torch.autograd.grad(got, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(gradient, slow)


def test_masked_sequence_keys_do_not_matter_next_to_a_branch() -> None:
    attention, _ = build()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    sequence = torch.randn(1, 3, 5, dtype=torch.float64)
    own = tuple(part[:, :, None] for part in attention.keys_values(x, torch.tensor([[2]])))
    mask = torch.tensor([[[True, True, False]]])
    outputs = []
    for last in (0.0, 100.0):
        keys = attention.keys_values(torch.cat([sequence[:, :2], sequence[:, 2:] + last], dim=1), torch.arange(3)[None])
        outputs.append(attention(x, torch.tensor([[2]]), keys, mask, own))
    assert torch.equal(*outputs)


def test_a_query_without_sequence_keys_sees_its_branch_alone() -> None:
    attention, _ = build()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    own = tuple(part[:, :, None] for part in attention.keys_values(x, torch.tensor([[0]])))
    sequence = attention.keys_values(torch.randn(1, 3, 5, dtype=torch.float64), torch.arange(3)[None])
    out = attention(x, torch.tensor([[0]]), sequence, torch.zeros(1, 1, 3, dtype=torch.bool), own)
    # One visible key has all the weight, so the output is its value, repeated for the heads of its group.
    value = attention.v_proj(x).view(2, 4).repeat_interleave(2, dim=0).flatten()
    torch.testing.assert_close(out[0, 0], attention.o_proj(value))


def test_the_rotary_table_grows_and_copies_with_the_module() -> None:
    attention, config = build()
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    attention.keys_values(x, torch.tensor([[3]]))
    far = torch.tensor([[700]])
    keys, _ = attention.keys_values(x, far)
    cos, sin = LlamaRotaryEmbedding(config)(x.float(), far)
    plain = attention.k_proj(x).view(1, 1, 2, 4).transpose(1, 2)
    _, expected = apply_rotary_pos_emb(plain, plain, cos.double(), sin.double())
    torch.testing.assert_close(keys, expected.transpose(1, 2))
    assert torch.equal(copy.deepcopy(attention).keys_values(x, far)[0], keys)
    assert not [name for name in attention.state_dict() if "rotary" in name]

"""Blocks after a shared context against Qwen3's own attention over each anchor's text alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

from aurora_rl.policies.block_layer import BlockLayer

REQUESTS, ANCHORS, WIDTH, CONTEXT, HIDDEN = 2, 3, 4, 6, 12
SEEN = torch.tensor([[6, 2, 0], [5, 5, 1]])  # context positions before each anchor's block


def config_of(heads: int, key_heads: int) -> Qwen3Config:
    return Qwen3Config(
        hidden_size=HIDDEN, intermediate_size=20, num_attention_heads=heads, num_key_value_heads=key_heads, head_dim=4,
        num_hidden_layers=1, rms_norm_eps=1e-3, attn_implementation="eager",
    )  # fmt: skip


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 2), (3, 1)])
def test_every_block_is_qwen3_over_the_context_that_its_anchor_sees(heads: int, key_heads: int) -> None:
    config = config_of(heads, key_heads)
    layer, reference = BlockLayer(config).double(), Qwen3DecoderLayer(config, layer_idx=0).double()
    with torch.no_grad():
        for parameter in layer.parameters():  # norms too, so that none is of ones
            parameter.normal_(std=0.5)
    reference.load_state_dict(layer.state_dict())
    rotary = Qwen3RotaryEmbedding(config)

    def rotation(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = rotary(torch.zeros(1), positions.reshape(1, -1))
        return cos.view(*positions.shape, -1).double(), sin.view(*positions.shape, -1).double()

    blocks = torch.randn(REQUESTS, ANCHORS, WIDTH, HIDDEN, dtype=torch.float64, requires_grad=True)
    states = torch.randn(REQUESTS, CONTEXT, HIDDEN, dtype=torch.float64, requires_grad=True)
    # The target's states come without the layer's first norm; Qwen3 reads all its inputs through it.
    read = layer.input_layernorm(states)
    context = layer.self_attn.keys_values(read, rotation(torch.arange(CONTEXT).expand(REQUESTS, -1)))
    mask = torch.arange(CONTEXT) < SEEN[:, :, None]
    out = layer(blocks, rotation(SEEN[:, :, None] + torch.arange(WIDTH)), context, mask)

    expected = torch.zeros_like(out)
    for request in range(REQUESTS):
        for anchor, seen in enumerate(SEEN[request].tolist()):
            text = torch.cat([states[request, :seen], blocks[request, anchor]])[None]
            embeddings = rotation(torch.arange(seen + WIDTH)[None])
            everything = torch.zeros(1, 1, seen + WIDTH, seen + WIDTH, dtype=torch.float64)  # both ways
            whole = reference(text, attention_mask=everything, position_embeddings=embeddings)
            expected[request, anchor] = whole[0, seen:]
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)

    weight = torch.randn_like(out)
    inputs = (blocks, states)
    gradients = torch.autograd.grad((weight * out).sum(), inputs)
    for gradient, slow in zip(gradients, torch.autograd.grad((weight * expected).sum(), inputs), strict=True):
        torch.testing.assert_close(gradient, slow, rtol=1e-6, atol=1e-6)


def test_context_that_an_anchor_does_not_see_changes_nothing() -> None:
    layer = BlockLayer(config_of(4, 2)).double()
    blocks = torch.randn(1, 1, WIDTH, HIDDEN, dtype=torch.float64)
    ones, zeros = torch.ones(1, 1, WIDTH, 4, dtype=torch.float64), torch.zeros(1, 1, WIDTH, 4, dtype=torch.float64)
    keys, values = torch.randn(2, 1, 3, 2, 4, dtype=torch.float64)
    mask = torch.tensor([[[True, False, False]]])
    out = layer(blocks, (ones, zeros), (keys, values), mask)
    alone = layer(blocks, (ones, zeros), (keys[:, :1], values[:, :1]), mask[:, :, :1])
    torch.testing.assert_close(out, alone)
    keys[:, 1:], values[:, 1:] = 1e3, 1e3
    assert torch.equal(layer(blocks, (ones, zeros), (keys, values), mask), out)

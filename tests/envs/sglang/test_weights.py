"""Checkpoint names in a module whose parameters lie as SGLang's do; test_plugin_real_server.py has the real one."""

import pytest
import torch
from torch import nn

from aurora_rl.envs.sglang.weights import SwapError, _check, read_back
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.testing import tiny_target


class Attention(nn.Module):
    def __init__(self, hidden, heads, kv_heads, size):
        super().__init__()
        self.q_size, self.kv_size = heads * size, kv_heads * size
        self.qkv_proj = nn.Linear(2 * hidden, self.q_size + 2 * self.kv_size, bias=False)
        self.o_proj = nn.Linear(self.q_size, hidden, bias=False)


class Layer(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.self_attn = Attention(hidden, 4, 2, 4)
        self.mlp = nn.ModuleDict(
            {
                "gate_up_proj": nn.Linear(hidden, 2 * inner, bias=False),
                "down_proj": nn.Linear(inner, hidden, bias=False),
            }
        )
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            self.add_module(name, nn.RMSNorm(hidden))


class Fused(nn.Module):
    """An EAGLE-3 drafter of the tiny target, fused."""

    def __init__(self, drafter):
        super().__init__()
        self.model = nn.Module()
        self.model.fc = nn.Linear(drafter.fc.in_features, 16, bias=False)
        self.model.layers = nn.ModuleList([Layer(16, 32)])
        self.model.norm = nn.RMSNorm(16)
        self.lm_head = nn.Linear(16, len(drafter.draft_vocab), bias=False)


@pytest.fixture
def drafter():
    return Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(0, 32, 2))


@pytest.fixture
def weights(drafter):
    return {name: tensor for name, tensor in drafter.published().items() if name != "d2t"}


def test_every_published_name_is_found_in_its_shape(drafter, weights):
    held = _check(read_back(Fused(drafter), weights), weights)
    assert set(held) == set(weights)


def test_parts_of_a_fused_parameter_are_views_of_its_rows(drafter, weights):
    fused = Fused(drafter)
    held = read_back(fused, weights)
    attention, mlp = fused.model.layers[0].self_attn, fused.model.layers[0].mlp
    for number, part in enumerate("qkv"):
        held[f"midlayer.self_attn.{part}_proj.weight"].fill_(number)
    assert attention.qkv_proj.weight[:, 0].tolist() == [0.0] * 16 + [1.0] * 8 + [2.0] * 8
    held["midlayer.mlp.gate_proj.weight"].fill_(3)
    held["midlayer.mlp.up_proj.weight"].fill_(4)
    assert mlp["gate_up_proj"].weight[:, 0].tolist() == [3.0] * 32 + [4.0] * 32
    held["norm.weight"].fill_(5)
    assert fused.model.norm.weight.unique().tolist() == [5.0]


def test_tensors_that_sglangs_drafter_lacks_or_has_in_another_shape_are_named(drafter, weights):
    fused = Fused(drafter)
    with pytest.raises(SwapError, match="no parameter for 'midlayer.gate.weight'"):
        spoiled = {**weights, "midlayer.gate.weight": torch.zeros(1)}
        _check(read_back(fused, spoiled), spoiled)
    with pytest.raises(SwapError, match=r"'fc.weight' has shape \(2, 2\), SGLang's drafter \(16, 32\)"):
        spoiled = {**weights, "fc.weight": torch.zeros(2, 2)}
        _check(read_back(fused, spoiled), spoiled)

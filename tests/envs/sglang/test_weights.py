"""Checkpoint names in a module whose parameters lie as SGLang's do; test_plugin_real_server.py has the real one."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from aurora_rl.envs.remote.session import SwapError
from aurora_rl.envs.sglang.weights import draft_vocab, shards_of, swap_weights
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
    found = shards_of(Fused(drafter), weights)
    assert set(found) == set(weights)
    assert all(shard.published is weights[name] for name, shard in found.items())


def test_parts_of_a_fused_parameter_are_views_of_its_rows(drafter, weights):
    fused = Fused(drafter)
    held = {name: shard.held for name, shard in shards_of(fused, weights).items()}
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
        shards_of(fused, {**weights, "midlayer.gate.weight": torch.zeros(1)})
    with pytest.raises(SwapError, match=r"'fc.weight' has shape \(2, 2\), SGLang's drafter \(16, 32\)"):
        shards_of(fused, {**weights, "fc.weight": torch.zeros(2, 2)})


def cut(rows, columns, rank, size):
    """A model of one tensor, `lm_head.weight`, of which a rank holds rows and columns."""
    model = nn.Module()
    model.lm_head = nn.Linear(columns, rows, bias=False)
    model.lm_head.tp_rank, model.lm_head.tp_size = rank, size
    return model


@pytest.mark.parametrize(
    ("held", "size", "parts"),
    [
        ((2, 4), 4, [(slice(0, 2),), (slice(2, 4),), (slice(4, 6),), (slice(6, 8),)]),  # by rows
        ((8, 1), 4, [(slice(None), slice(rank, rank + 1)) for rank in range(4)]),  # by columns
        ((4, 4), 4, [(slice(0, 4),), (slice(0, 4),), (slice(4, 8),), (slice(4, 8),)]),  # fewer key heads than ranks
        ((8, 4), 4, [(slice(None),)] * 4),  # the same on all
    ],
)
def test_a_rank_holds_a_part_of_a_tensor_by_its_number(held, size, parts):
    whole = torch.arange(32.0).view(8, 4)
    for rank, part in enumerate(parts):
        shard = shards_of(cut(*held, rank, size), {"lm_head.weight": whole})["lm_head.weight"]
        assert torch.equal(shard.published, whole[part]) and shard.held.shape == held


def test_rows_of_a_vocabulary_have_padding_after_them():
    whole = torch.arange(20.0).view(10, 2)
    for rank, (first, last) in enumerate([(0, 8), (8, 10)]):
        model = cut(8, 2, rank, 2)
        model.lm_head.org_vocab_size = 10
        model.lm_head.shard_indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=last)
        shard = shards_of(model, {"lm_head.weight": whole})["lm_head.weight"]
        assert torch.equal(shard.published, whole[first:last]) and len(shard.held) == last - first
        with pytest.raises(SwapError, match=r"shape \(9, 2\), SGLang's drafter \(8, 2\) on each of 2 ranks"):
            shards_of(model, {"lm_head.weight": whole[:9]})


@pytest.mark.parametrize("held", [(3, 4), (4, 2), (1, 4)])
def test_a_part_that_no_rank_can_hold_is_named(held):
    with pytest.raises(SwapError, match=r"shape \(8, 4\)"):
        shards_of(cut(*held, 0, 4), {"lm_head.weight": torch.zeros(8, 4)})


# ---- loading --------------------------------------------------------------------------------------------------------


class Runner:
    """SGLang's, of a model of one tensor, with what becomes of it."""

    def __init__(self, loads=lambda model, weights: model.lm_head.weight.data.copy_(weights["lm_head.weight"])):
        self.model, self.device, self.weight_updater = cut(8, 4, 0, 1), "cpu", self
        self.before = self.model.lm_head.weight.detach().clone()
        self.calls, self._loads = [], loads

    def begin_weight_update(self):
        self.calls.append("begin")

    def update_weights_from_tensor(self, named_tensors):
        self.calls.append("load")
        self._loads(self.model, dict(named_tensors))
        return True, "Success"

    def end_weight_update(self, run_post_load):
        self.calls.append("end")


NEW = {"lm_head.weight": torch.arange(32.0).view(8, 4)}


def test_weights_are_loaded_once_all_ranks_have_them():
    runner, heard = Runner(), []
    swap_weights(SimpleNamespace(_session=None), runner, NEW, lambda fault: heard.append(fault) or "")
    assert torch.equal(runner.model.lm_head.weight, NEW["lm_head.weight"])
    assert runner.calls == ["begin", "load", "end"] and heard == [""]


def garble(model, weights):
    model.lm_head.weight.data.copy_(weights["lm_head.weight"])[0, 0] += 1


def half(model, weights):
    garble(model, weights)
    raise AssertionError("shapes differ")


@pytest.mark.parametrize(
    ("loads", "fault"),
    [(garble, "'lm_head.weight' in SGLang's drafter is not what was loaded"), (half, "AssertionError: shapes differ")],
)
def test_a_fault_of_this_rank_is_told_and_the_old_weights_are_put_back(loads, fault):
    runner, heard = Runner(loads), []
    with pytest.raises(SwapError, match="rank 0 of 2: it failed"):
        swap_weights(None, runner, NEW, lambda fault: heard.append(fault) or "rank 0 of 2: it failed")
    assert heard == [fault] and torch.equal(runner.model.lm_head.weight, runner.before) and runner.calls[-1] == "end"


def test_a_fault_of_another_rank_puts_the_old_weights_back():
    runner = Runner()
    with pytest.raises(SwapError, match="rank 1 of 2: no memory"):
        swap_weights(None, runner, NEW, lambda fault: "rank 1 of 2: no memory")
    assert torch.equal(runner.model.lm_head.weight, runner.before) and runner.calls == ["begin", "load", "end"]


def test_a_rank_that_does_not_answer_puts_the_old_weights_back():
    def lost(fault):
        raise TimeoutError("rank 1 did not answer")

    runner = Runner()
    with pytest.raises(TimeoutError):
        swap_weights(None, runner, NEW, lost)
    assert torch.equal(runner.model.lm_head.weight, runner.before) and runner.calls == ["begin", "load", "end"]


@pytest.mark.parametrize(
    ("session", "weights", "message"),
    [
        ("all", NEW, "somebody else's weight update"),
        (None, {"fc.weight": torch.zeros(1)}, "no parameter for 'fc.weigh"),
    ],
)
def test_nothing_is_touched_where_weights_cannot_fit(session, weights, message):
    runner = Runner()
    with pytest.raises(SwapError, match=message):
        swap_weights(SimpleNamespace(_session=session), runner, weights)
    assert runner.calls == []


def test_the_draft_vocabulary_is_the_map_or_the_whole():
    config = SimpleNamespace(vocab_size=6)
    worker = SimpleNamespace(hot_token_id=None, draft_runner=SimpleNamespace(model=SimpleNamespace(config=config)))
    assert draft_vocab(worker).tolist() == [0, 1, 2, 3, 4, 5]
    worker.hot_token_id = torch.tensor([1, 4], dtype=torch.int32)
    assert draft_vocab(worker).tolist() == [1, 4] and draft_vocab(worker).dtype == torch.int64

"""An EAGLE-3 drafter whose layers are cut over two ranks as SGLang's are."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from aurora_rl.envs.sglang.ranks import EngineRanks
from aurora_rl.policies import Eagle3Drafter, TargetParts
from aurora_rl.testing import tiny_target

SIZE, HIDDEN, INNER, HEADS, KV_HEADS, HEAD = 2, 16, 32, 4, 2, 4
LAYERS, VOCAB = (1, 2), torch.arange(0, 32, 2)
PADDED = 12  # rows of the draft head on each rank: 16 in all are padded to 24, and rank 1 has 4
TARGET = tiny_target(dtype=torch.float32)
PARTS = TargetParts.of(TARGET)


def drafter_of(seed: int) -> Eagle3Drafter:
    torch.manual_seed(seed)
    drafter = Eagle3Drafter.from_target(PARTS, draft_vocab=VOCAB, feature_layers=LAYERS)
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return drafter


class Cut(nn.Module):
    """A linear layer that is cut over the ranks, by rows or by columns."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, columns), requires_grad=False)
        self.tp_rank, self.tp_size = rank, SIZE


class Head(Cut):
    """By vocabulary, with padding."""

    def __init__(self, rank: int) -> None:
        super().__init__(PADDED, HIDDEN, rank)
        first, last = min(rank * PADDED, len(VOCAB)), min((rank + 1) * PADDED, len(VOCAB))
        self.org_vocab_size = len(VOCAB)
        self.shard_indices = SimpleNamespace(org_vocab_start_index=first, org_vocab_end_index=last)


class Attention(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.q_size, self.kv_size = HEADS * HEAD // SIZE, KV_HEADS * HEAD // SIZE
        self.qkv_proj = Cut(self.q_size + 2 * self.kv_size, 2 * HIDDEN, rank)
        self.o_proj = Cut(HIDDEN, HEADS * HEAD // SIZE, rank)


class Layer(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.self_attn, self.mlp = Attention(rank), nn.Module()
        self.mlp.gate_up_proj = Cut(2 * INNER // SIZE, HIDDEN, rank)
        self.mlp.down_proj = Cut(HIDDEN, INNER // SIZE, rank)
        for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm"):
            self.add_module(name, nn.RMSNorm(HIDDEN))


class LlamaForCausalLMEagle3(nn.Module):
    """An EAGLE-3 drafter as one rank of SGLang has it, by the name there."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank, self.spoil = rank, ""
        self.config = SimpleNamespace(draft_vocab_size=len(VOCAB), vocab_size=32)
        self.model = nn.Module()
        self.model.fc = nn.Linear(HIDDEN * len(LAYERS), HIDDEN, bias=False)
        self.model.layers = nn.ModuleList([Layer(rank)])
        self.model.norm = nn.RMSNorm(HIDDEN)
        self.lm_head = Head(rank)
        self.requires_grad_(False)

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Cut each tensor as SGLang's layers do, written for itself and not by our reading of it."""
        if self.spoil == "raise":
            raise AssertionError("param_data.shape differs")
        held, rank = dict(self.named_parameters()), self.rank
        qkv, q = "model.layers.0.self_attn.qkv_proj.weight", HEADS * HEAD // SIZE
        k = KV_HEADS * HEAD // SIZE
        for name, tensor in weights:
            if name == "d2t":
                continue
            match name.removeprefix("midlayer."):
                case "self_attn.q_proj.weight":
                    held[qkv][:q] = tensor.chunk(SIZE)[rank]
                case "self_attn.k_proj.weight":
                    held[qkv][q : q + k] = tensor.chunk(SIZE)[rank]
                case "self_attn.v_proj.weight":
                    held[qkv][q + k :] = tensor.chunk(SIZE)[rank]
                case "mlp.gate_proj.weight":
                    held["model.layers.0.mlp.gate_up_proj.weight"][: INNER // SIZE] = tensor.chunk(SIZE)[rank]
                case "mlp.up_proj.weight":
                    held["model.layers.0.mlp.gate_up_proj.weight"][INNER // SIZE :] = tensor.chunk(SIZE)[rank]
                case "self_attn.o_proj.weight" | "mlp.down_proj.weight" as part:
                    held[f"model.layers.0.{part}"].copy_(tensor.chunk(SIZE, dim=1)[rank])
                case "lm_head.weight":
                    rows = tensor[rank * PADDED :][:PADDED]
                    held["lm_head.weight"].zero_()[: len(rows)] = rows
                case "fc.weight" | "norm.weight":
                    held[f"model.{name}"].copy_(tensor)
                case norm:
                    held[f"model.layers.0.{norm}"].copy_(tensor)
        if self.spoil == "garble":
            self.model.fc.weight[0, 0] += 1

    def weights(self, ranks: EngineRanks) -> dict[str, Tensor]:
        """Every parameter of every rank, by `name.rank`, on rank 0."""
        found = {}
        for name, parameter in self.named_parameters():
            for rank, each in enumerate(ranks.gather(parameter.data.clone())):
                found[f"{name}.{rank}"] = each
        return found

"""The time of a round by the shape of its trees and by the number of requests, on a target of any size.

What a round costs does not depend on what the weights say, so that a random target of a real model's size serves: it is
evidence of costs, and none of acceptance. `break_even` is the acceptance length from which on a shape pays.

python benchmarks/rounds.py --size 8b --slots 1,8,16,32 --context 1024
"""

from __future__ import annotations

import argparse

import torch
from common import arguments, parse, write_result
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from aurora_rl import Request, SamplingParams, TargetParts, TreeShape
from aurora_rl.models.loading import default_dtype
from aurora_rl.policies import get_drafter
from aurora_rl.policies.calibration import cost_table, measure_rounds
from aurora_rl.policies.decoder import SpeculativeDecoder

# Hidden size, intermediate size, layers, heads, heads of keys and values, vocabulary.
SIZES = {
    "tiny": (64, 128, 2, 4, 2, 512),
    "0.6b": (1024, 3072, 28, 16, 8, 151936),
    "8b": (4096, 12288, 36, 32, 8, 151936),
    "32b": (5120, 25600, 64, 64, 8, 151936),
}


def random_target(size: str, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Qwen3 of a size with random weights, drawn once; transformers' own initialisation is skipped."""
    hidden, intermediate, layers, heads, kv_heads, vocab = SIZES[size]
    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads if size == "tiny" else 128,
        vocab_size=vocab,
        max_position_embeddings=40960,
        tie_word_embeddings=size == "0.6b",
    )
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, weight in model.named_parameters():
        torch.nn.init.ones_(weight) if "norm" in name else torch.nn.init.normal_(weight, std=0.02)
    return model.eval().requires_grad_(False)


def measure(options: argparse.Namespace, model: PreTrainedModel, slots: int) -> dict:
    """Time rounds of each shape with all slots occupied."""
    drafter = get_drafter(options.drafter).from_target(
        TargetParts.of(model), draft_vocab=torch.arange(min(options.draft_vocab, model.config.vocab_size))
    )
    shapes = [TreeShape(0), *(TreeShape(depth) for depth in (1, 2, 4)), TreeShape(4, 4, 8), TreeShape(6, 8, 32)]
    new_tokens = 64
    decoder = SpeculativeDecoder(
        model,
        drafter,
        [],
        shape=TreeShape(6, 8, 32),
        max_length=options.context + new_tokens + 64,
        num_slots=slots,
    )
    prompt = torch.randint(0, model.config.vocab_size, (options.context,))
    request = Request(0, prompt, SamplingParams(max_tokens=new_tokens))
    costs = measure_rounds(decoder.engine, decoder.policy, request, shapes, repeats=options.repeats)[slots]
    plain = costs[shapes[0]]
    return {
        "slots": slots,
        "round_ms": cost_table({slots: costs})[slots],
        "break_even": {f"{s.depth}x{s.width}, {s.num_nodes} nodes": round(costs[s] / plain, 3) for s in shapes[1:]},
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--size", default="0.6b", choices=list(SIZES))
    parser.add_argument("--slots", default="1,8,16,32")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each prompt")
    parser.add_argument("--drafter", default="eagle3")
    parser.add_argument("--draft-vocab", type=int, default=32000)
    parser.add_argument("--repeats", type=int, default=11)
    options = parse(parser)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = random_target(options.size, default_dtype(options.device), options.device)
    cells = []
    for slots in (int(count) for count in options.slots.split(",")):
        cells.append(measure(options, model, slots))
        print(cells[-1], flush=True)
    figures = {"size": options.size, "dtype": str(model.dtype), "context": options.context, "drafter": options.drafter}
    write_result(__file__, options, {**figures, "threads": options.threads, "cells": cells})


if __name__ == "__main__":
    main()

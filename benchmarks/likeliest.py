"""What imitation loses where a target gives its likeliest tokens in place of hidden states, by their number.

An untrained EAGLE-3 drafter of SmolLM2 drafts chains for a batch of code requests, greedy and sampled, in float32. The
batch is turned into the form with `K` tokens. Loss and gradient of imitation are compared with those of hidden states,
at the start and after steps on that batch with hidden states. This takes some minutes of CPU time.

python benchmarks/likeliest.py --limit 6 --max-new-tokens 48
"""

from __future__ import annotations

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import arguments, parse, write_result
from tensordict import TensorDict
from torch import Tensor

from aurora_rl import Request, SamplingParams, TargetParts, TreeShape
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.models.loading import encode_chat, load_target, stop_token_ids
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import ImitationLoss, SumLoss
from aurora_rl.policies import Drafter, Eagle3Drafter, choose_draft_vocab, token_prior
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.testing import topk_form
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_step
from aurora_rl.trajectories import pack
from aurora_rl.workload.traffic import generate_traffic


def recorded(options: argparse.Namespace, temperature: float) -> tuple[Drafter, TargetHead, list[TensorDict]]:
    """The drafter, the target's head, and the requests that it drafted for."""
    torch.manual_seed(0)
    model, tokenizer = load_target("smollm2", dtype=torch.float32, device=options.device)
    prompts = [encode_chat(tokenizer, each.messages) for each in generate_traffic(options.limit, domains=["code"])]
    parts, vocab = TargetParts.of(model), choose_draft_vocab(options.vocab_size, token_prior(model, prompts))
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=vocab)
    requests = [
        Request(i, torch.tensor(ids), SamplingParams(temperature, seed=i, max_tokens=options.max_new_tokens))
        for i, ids in enumerate(prompts)
    ]
    with TemporaryDirectory() as folder:
        recording = TrajectoryDataset(Path(folder))
        stops = stop_token_ids(model, tokenizer)
        record_requests(model, drafter, requests, recording, shape=TreeShape(4), stop_tokens=stops)
        return drafter, TargetHead.like(parts.head), list(recording)


def gradient(drafter: Drafter, head: TargetHead, batch: TensorDict) -> tuple[Tensor, Tensor]:
    """Imitation's value at every position, and the gradient of their mean."""
    values = ImitationLoss(drafter, head, reduction="none")(batch)["loss_imitation"]
    loss = ImitationLoss(drafter, head)(batch)["loss_imitation"]
    learned = [each for each in drafter.parameters() if each.requires_grad]
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    # In float64, since a cosine of millions of float32 numbers would exceed 1.
    return values.detach(), torch.cat([each.flatten().double() for each in found if each is not None])


def compared(options: argparse.Namespace, temperature: float) -> list[dict[str, float]]:
    """The differences by number of tokens, before and after the steps."""
    drafter, head, trajectories = recorded(options, temperature)
    whole = pack(trajectories)
    batches = {k: pack([topk_form(each, head, k) for each in trajectories]) for k in options.counts}
    optimizers, found = drafter_optimizers(drafter), []
    for steps in (0, options.steps):
        for _ in range(steps):
            train_step(SumLoss([ImitationLoss(drafter, head)]), optimizers, whole, autocast=False)
        values, exact = gradient(drafter, head, whole)
        for k, batch in batches.items():
            others, near = gradient(drafter, head, batch)
            found.append(
                {
                    "temperature": temperature,
                    "k": k,
                    "steps": steps,
                    "loss": values.mean().item(),
                    "tail": batch["sequence", "tail_log_prob"].exp().mean().item(),
                    "tail_of_nodes": batch["nodes", "tail_log_prob"].exp().mean().item(),
                    "difference": (others - values).abs().mean().item(),
                    "cosine": torch.cosine_similarity(near, exact, dim=0).item(),
                    "norm": (near.norm() / exact.norm()).item(),
                }
            )
            print(found[-1], flush=True)
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--counts", type=lambda text: [int(k) for k in text.split(",")], default="8,32,64,256")
    parser.add_argument("--steps", type=int, default=40, help="steps on the batch before it is compared again")
    parser.add_argument("--vocab-size", type=int, default=8192)
    options = parse(parser)
    torch.set_num_threads(options.threads)
    cells = [cell for temperature in (0.0, 1.0) for cell in compared(options, temperature)]
    write_result(__file__, options, {"threads": options.threads, "cells": cells})


if __name__ == "__main__":
    main()

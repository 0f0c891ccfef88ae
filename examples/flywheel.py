"""The whole loop in one process: serve a little, learn from it, swap the drafter, serve on.

`aurora-rl flywheel` runs the same parts in two processes, with a wire, a gate and windows of plain decoding between
them, and `LLM.learn` takes a list of completions. Here the parts stand in one loop, to be read and changed:

    python examples/flywheel.py --requests 48
"""

from __future__ import annotations

import argparse

import torch

from aurora_rl import Completion, Eagle3Drafter, Request, SamplingParams, TargetParts, TreeShape
from aurora_rl.envs import generation_processors
from aurora_rl.models.draft_vocab import choose_draft_vocab, token_prior
from aurora_rl.models.loading import default_dtype, encode_chat, load_target, stop_token_ids
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.training.steps import train_step
from aurora_rl.trajectories import acceptance_length
from aurora_rl.workload.traffic import generate_traffic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="smollm2, a hub id, or a folder")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--round", type=int, default=8, help="requests between two swaps")
    parser.add_argument("--passes", type=int, default=4, help="batches learned from for each batch served")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    # The target, and the requests that it will serve.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_target(options.model, dtype=default_dtype(device), device=device)
    prompts = [encode_chat(tokenizer, p.messages) for p in generate_traffic(options.requests)]
    sampling = SamplingParams(max_tokens=options.max_new_tokens)
    requests = [Request(i, torch.tensor(p), sampling) for i, p in enumerate(prompts)]

    # A drafter that knows nothing but where the target starts and ends.
    parts = TargetParts.of(model)
    vocab = choose_draft_vocab(min(4096, len(parts.head)), token_prior(model, prompts[:32]))
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=vocab).to(device)

    # Learning: a loss on packed trajectories, a replay buffer.
    loss = ImitationLoss(drafter, parts.head.float(), steps=3)
    optimizers = drafter_optimizers(drafter, muon_lr=0.02, adam_lr=1e-3)
    buffer = trajectory_buffer(capacity=1000, batch_size=4)

    # Serving: slots of an engine are an environment, and a copy of the drafter is its policy.
    stop_tokens = stop_token_ids(model, tokenizer)
    finished: list[Completion] = []
    decoder = SpeculativeDecoder(
        model,
        drafter,
        requests,
        shape=TreeShape(depth=3),
        max_length=512,
        num_slots=4,
        stop_tokens=stop_tokens,
        processors=generation_processors(model, stop_tokens),
        on_completion=finished.append,
    )
    policy = decoder.policy
    for _ in decoder.rounds():
        if len(finished) < options.round and decoder.env.num_active:
            continue
        trajectories = [c.trajectory for c in finished if c.trajectory is not None]
        tokens, rounds = (sum(column) for column in zip(*map(acceptance_length, trajectories), strict=True))
        print(f"version {policy.version}: acceptance length {tokens / rounds:.2f} over {len(finished)} requests")
        buffer.extend(trajectories)
        for _ in range(options.passes * max(len(finished) // 4, 1)):
            train_step(loss, optimizers, buffer.sample(), autocast=False)
        policy.install(drafter.published(), policy.version + 1)
        finished.clear()


if __name__ == "__main__":
    main()

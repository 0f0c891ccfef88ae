"""First from a recording, then while serving: a drafter that is learned offline goes on learning online.

    python examples/offline_to_online.py --recording runs/chains --online 24

The first half is `train_imitation.py`; the second serves new requests with the result, swaps in better weights between
two rounds of decoding, and learns from what came. `aurora-rl flywheel drafter.path=...` does the second half in two
processes, with a gate in between.
"""

from __future__ import annotations

import torch
from common import arguments, open_stream

from aurora_rl import Request, SamplingParams, TreeShape
from aurora_rl.envs import generation_processors
from aurora_rl.models.loading import default_dtype, encode_chat, load_target, stop_token_ids
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.training.steps import train_step
from aurora_rl.trajectories import acceptance_length
from aurora_rl.workload.traffic import generate_traffic


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--online", type=int, default=24, help="requests to serve after the recording")
    parser.add_argument("--round", type=int, default=8, help="requests between two swaps")
    options = parser.parse_args()
    shape = TreeShape(depth=4)
    stream = open_stream(options, shape)
    loss = ImitationLoss(stream.drafter, stream.head)
    stream.learn(loss)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = default_dtype(device)
    # Loaded anew: an engine changes its model in place, and that of the recording belongs to `open_stream`.
    model, tokenizer = load_target(options.model, dtype=dtype, device=device)
    sampling = SamplingParams(max_tokens=options.max_new_tokens)
    prompts = [torch.tensor(encode_chat(tokenizer, p.messages)) for p in generate_traffic(options.online, seed=1)]
    stop_tokens = stop_token_ids(model, tokenizer)
    finished: list = []
    decoder = SpeculativeDecoder(
        model,
        stream.drafter,
        [Request(i, prompt, sampling) for i, prompt in enumerate(prompts)],
        shape=shape,
        max_length=512,
        num_slots=2,
        stop_tokens=stop_tokens,
        processors=generation_processors(model, stop_tokens),
        on_completion=lambda completion: finished.append(completion.trajectory),
    )
    policy = decoder.policy
    optimizers = drafter_optimizers(stream.drafter)
    buffer = trajectory_buffer(1000, batch_size=4)
    buffer.extend(stream.train)  # what was recorded is replayed with what comes

    for _ in decoder.rounds():
        if len(finished) < options.round and decoder.env.num_active:
            continue
        tokens, rounds = (sum(column) for column in zip(*map(acceptance_length, finished), strict=True))
        print(f"version {policy.version}: acceptance length {tokens / rounds:.2f} over {len(finished)} requests")
        buffer.extend(finished)
        for _ in range(len(finished)):
            train_step(loss, optimizers, buffer.sample(), autocast=dtype == torch.bfloat16)
        policy.install(stream.drafter.published(), policy.version + 1)
        finished.clear()
    stream.save(options.out)


if __name__ == "__main__":
    main()

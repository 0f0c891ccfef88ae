"""Memory and time of a learner's step by the number of processes that share it, on a target of any size.

A step depends on shapes alone, so that a random target and random trajectories serve: requests of `--tokens` tokens,
half of them completion, without trees, learned by imitation. Without torchrun it is one process.

python benchmarks/ranks.py --hidden 512 --vocab 16384
torchrun --standalone --nproc-per-node 2 benchmarks/ranks.py --hidden 512 --vocab 16384

On GPUs, an EAGLE-3 drafter of the size for an 8B model:

torchrun --standalone --nproc-per-node 8 benchmarks/ranks.py --device cuda --hidden 4096 --vocab 151936 \
    --draft-vocab 32000 --batch 16 --tokens 4096
"""

from __future__ import annotations

import os
import resource
import time

import torch
from common import arguments, parse, write_result
from tensordict import TensorDict
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from aurora_rl import SamplingParams
from aurora_rl.objectives import ImitationLoss, SumLoss
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.parallel import ParallelLoss, RankCommand, Ranks, follow, join, start_alike
from aurora_rl.training.sharding import shard
from aurora_rl.training.steps import train_step
from aurora_rl.trajectories import make_trajectory, pack


def trajectories(
    count: int, tokens: int, width: int, features: int, vocab: int, dtype: torch.dtype
) -> list[TensorDict]:
    """Random requests of one length."""
    generator = torch.Generator().manual_seed(0)
    return [
        make_trajectory(
            request=number,
            tokens=torch.randint(vocab, (tokens,), generator=generator),
            prompt_length=tokens // 2,
            features=torch.randn(tokens - 1, features, generator=generator).to(dtype),
            target={"hidden": torch.randn(tokens - tokens // 2, width, generator=generator).to(dtype)},
            anchors=[],
            trees=[],
            policy_versions=[],
            cache_versions=[],
            sampling_params=SamplingParams(),
        )
        for number in range(count)
    ]


def peak_bytes(device: torch.device) -> int:
    """Most memory that was taken so far: of the GPU, or resident of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def held_bytes(drafter: Drafter, optimizers: list[torch.optim.Optimizer]) -> int:
    """Bytes of weights that learn and of optimizer states that this process holds between two steps."""
    states = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    tensors = [p for p in drafter.parameters() if p.requires_grad] + [v for v in states if isinstance(v, torch.Tensor)]
    return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--hidden", type=int, default=512, help="width of the target")
    parser.add_argument("--vocab", type=int, default=16384, help="vocabulary of the target")
    parser.add_argument("--draft-vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=8, help="requests of a step, of all processes together")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a request")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed, after one that is not")
    parser.add_argument("--parallel", choices=["ddp", "fsdp"], default="ddp", help="how processes share the steps")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    device, ranks = torch.device(options.device), None
    if "RANK" in os.environ:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        ranks = join(device)
    half = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden, intermediate_size=3 * options.hidden, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, vocab_size=options.vocab,
    )  # fmt: skip
    parts = TargetParts.of(LlamaForCausalLM(config).to(device, half).requires_grad_(False))
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(options.draft_vocab)).float().to(device)
    loss = SumLoss([ImitationLoss(drafter, parts.head)])
    optimizers = drafter_optimizers(drafter)
    width = options.hidden * len(drafter.feature_layers)
    before = peak_bytes(device)
    if ranks is not None:
        shared = ParallelLoss(loss, ranks, optimizers)
        start_alike(shared, optimizers)
        if options.parallel == "fsdp":
            shard(shared, drafter, optimizers)
        if ranks.rank:
            began = time.process_time()
            follow(shared, optimizers, autocast=half == torch.bfloat16)
            report(ranks, time.process_time() - began, drafter, optimizers, device)
            ranks.leave()
            return
    batch = pack(trajectories(options.batch, options.tokens, options.hidden, width, options.vocab, half))
    seconds, cpu = [], time.process_time()
    for _ in range(1 + options.steps):
        began = time.perf_counter()
        train_step(loss if ranks is None else shared, optimizers, batch, autocast=half == torch.bfloat16)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    cpu = time.process_time() - cpu
    figures = {
        "processes": 1 if ranks is None else ranks.size,
        "parameters": sum(p.numel() for p in drafter.parameters() if p.requires_grad),
        "tokens_per_step": options.batch * options.tokens,
        "step_seconds": min(seconds[1:]),
        "peak_bytes_before": before,
    }
    if ranks is None:
        figures |= {"parallel": None, "cpu_seconds": [round(cpu / len(seconds), 3)]}
        figures |= {"held_bytes": [held_bytes(drafter, optimizers)], "peak_bytes": [peak_bytes(device)]}
    else:
        ranks.tell(RankCommand.END)
        cpus, held, peaks = report(ranks, cpu, drafter, optimizers, device)
        figures |= {"parallel": options.parallel, "cpu_seconds": [round(each / len(seconds), 3) for each in cpus]}
        figures |= {"held_bytes": held, "peak_bytes": peaks}
        ranks.leave()
    write_result(__file__, options, figures)


def report(
    ranks: Ranks, cpu: float, drafter: Drafter, optimizers: list[torch.optim.Optimizer], device: torch.device
) -> tuple[list[float], list[int], list[int]]:
    """CPU time, bytes of weights and states between two steps, and peak memory of every process."""
    own = torch.tensor([cpu, held_bytes(drafter, optimizers), peak_bytes(device)], dtype=torch.float64)
    cpus, *sizes = ranks.gather(own).T
    held, peaks = (each.long().tolist() for each in sizes)
    return cpus.tolist(), held, peaks


if __name__ == "__main__":
    main()

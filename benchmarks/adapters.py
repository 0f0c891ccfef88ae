"""Tenants with an adapter each against tenants that share one drafter: acceptance on requests still to come.

    python benchmarks/adapters.py
    python benchmarks/adapters.py --domains code,chat --requests 96 --max-new-tokens 64
    python benchmarks/adapters.py --cost

Both learn from the same stream, in order of arrival, by the same number of steps. Without domains the tenants are
contrary: of the same prompts each has a text of its own, by its own rule of which token follows which, and features
tell nothing of the tenant. This takes a minute. With domains each tenant asks SmolLM2 the built-in generator's requests
of one of them. Where rules are contrary, acceptance is given for each seed. --cost measures another thing: CPU time of
a draft on SmolLM2 without adapters, with one for each request, and with adapters that no request has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import MAX_LENGTH, arguments, parse, write_result
from tensordict import TensorDict

from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.models.loading import default_dtype, encode_chat, load_target, stop_token_ids
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import ImitationLoss
from aurora_rl.policies import Drafter, Eagle3Drafter, TargetParts, TreeShape, choose_draft_vocab, token_prior
from aurora_rl.policies.adapters import add_adapters
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.serving.recorded_requests import record_requests
from aurora_rl.testing import tiny_target
from aurora_rl.training.gate import replay
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.steps import train_on
from aurora_rl.trajectories import adapter_code, make_trajectory
from aurora_rl.workload.traffic import generate_traffic

TENANTS = ("acme", "globex")
VOCAB, PROMPT, FEATURES = 32, 4, 32


def contrary(count: int, new_tokens: int = 12) -> list[TensorDict]:
    """The tenants' requests in turns: each prompt is asked by both, and continued by the rule of who asks."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(VOCAB, FEATURES, generator=generator)  # of a token, whoever asks
    rules = {tenant: torch.randperm(VOCAB, generator=generator) for tenant in TENANTS}
    prompts = torch.randint(VOCAB, (count, PROMPT), generator=generator)
    likely = {
        "topk_log_probs": torch.full((new_tokens, 1), 0.99).log(),
        "tail_log_prob": torch.full((new_tokens,), 0.01).log(),
    }
    found = []
    for number in range(count):
        tenant, text = TENANTS[number % 2], prompts[number // 2].tolist()
        for _ in range(new_tokens):
            text.append(int(rules[tenant][text[-1]]))
        tokens = torch.tensor(text)
        found.append(
            make_trajectory(
                request=number,
                tokens=tokens,
                prompt_length=PROMPT,
                features=features[tokens[:-1]],
                target={"topk_ids": tokens[PROMPT:, None], **likely},
                anchors=[],
                trees=[],
                policy_versions=[],
                cache_versions=[],
                sampling_params=SamplingParams(),
                adapter=adapter_code(tenant),
            )
        )
    return found


def curve(
    drafter: Drafter, head: TargetHead, stream: Sequence[TensorDict], every: int, seed: int, dtype: torch.dtype
) -> list[tuple[int, float, list[float]]]:
    """After every so many requests: how many, and acceptance on the next ones, of all and of each tenant."""
    loss, served, found = ImitationLoss(drafter, head), drafter.serving_copy(dtype), []
    steps = train_on(
        stream[:-every], loss, drafter_optimizers(drafter), replay=4, seed=seed, autocast=dtype == torch.bfloat16
    )
    for seen, _, _ in steps:
        if seen % every == 0:
            served.install(drafter.published())
            ahead = stream[seen : seen + every]
            outcome = replay(served, ahead, TreeShape(3))
            own = [(outcome.tokens[i::2].sum() / outcome.rounds[i::2].sum()).item() for i in range(2)]
            found.append((seen, round(outcome.acceptance_length, 3), [round(each, 3) for each in own]))
    return found


def compared(
    parts: TargetParts, vocab: torch.Tensor, stream: Sequence[TensorDict], options: Any, seed: int, dtype: torch.dtype
) -> dict[str, list[tuple[int, float, list[float]]]]:
    """The curves of the drafter that is shared, and of the one with adapters."""
    found = {}
    for name, rank in (("shared", 0), ("adapters", options.rank)):
        torch.manual_seed(seed)
        drafter = Eagle3Drafter.from_target(parts, draft_vocab=vocab)
        if rank:
            add_adapters(drafter, TENANTS, rank)
        head = TargetHead.like(parts.head).float()
        found[name] = curve(drafter, head, stream, options.every, seed, dtype)
        print(f"seed {seed}, {name}: {found[name]}", flush=True)
    return found


def recorded(options: Any) -> tuple[TargetParts, torch.Tensor, list[TensorDict], torch.dtype]:
    """SmolLM2's answers to the tenants' requests, in turns, and a draft vocabulary of their prompts."""
    dtype = default_dtype(options.device)
    model, tokenizer = load_target("smollm2", dtype=dtype, device=options.device)
    parts, half = TargetParts.of(model), options.requests // 2
    prompts = [generate_traffic(half, domains=(domain,)) for domain in options.domains.split(",")]
    ids = [encode_chat(tokenizer, each.messages) for pair in zip(*prompts, strict=True) for each in pair]
    vocab = choose_draft_vocab(options.vocab_size, token_prior(model, ids[:64]))
    requests = [
        Request(i, torch.tensor(each), SamplingParams(max_tokens=options.max_new_tokens)) for i, each in enumerate(ids)
    ]
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=vocab)
    with TemporaryDirectory() as folder:
        recording = TrajectoryDataset(Path(folder))
        stop_tokens = stop_token_ids(model, tokenizer)
        record_requests(model, drafter, requests, recording, shape=TreeShape(2), stop_tokens=stop_tokens)
        stream = sorted(recording, key=lambda each: int(each["request"]))
    for number, trajectory in enumerate(stream):
        trajectory["sequence", "adapter"] = torch.tensor(adapter_code(TENANTS[number % 2]))
    return parts, vocab, stream, dtype


def draft_milliseconds(options: Any, slots: int, tenants: Sequence[str], asking: Sequence[str | None]) -> float:
    """Median CPU time of a draft with this many slots; `tenants` have adapters, and those that ask take turns."""
    model, _ = load_target("smollm2", dtype=default_dtype(options.device), device=options.device)
    drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(options.vocab_size))
    if tenants:
        add_adapters(drafter, tenants, options.rank)
    sampling, prompt = SamplingParams(max_tokens=options.max_new_tokens), torch.arange(100, 164)
    requests = [Request(i, prompt, sampling, tenant=asking[i % len(asking)]) for i in range(slots)]
    decoder = SpeculativeDecoder(model, drafter, requests, shape=TreeShape(4), max_length=MAX_LENGTH, num_slots=slots)
    policy, spent = decoder.policy, []
    assert policy is not None
    draft = policy.draft

    def timed(*arguments: Any) -> TensorDict:
        began = time.process_time()
        out = draft(*arguments)
        spent.append(time.process_time() - began)
        return out

    policy.draft = timed
    for _ in decoder.rounds():
        pass
    return round(1e3 * statistics.median(spent[1:-1]), 2)


def costs(options: Any) -> list[dict[str, float]]:
    """CPU time of drafts at two and at eight slots, the least of three turns: other work only adds to it."""
    ways = {"without": ((), (None,)), "with": (TENANTS, TENANTS), "with, of other tenants": (TENANTS, (None,))}
    turns = [
        {(slots, way): draft_milliseconds(options, slots, *of) for slots in (2, 8) for way, of in ways.items()}
        for _ in range(3)
    ]
    return [{"slots": slots, **{way: min(turn[slots, way] for turn in turns) for way in ways}} for slots in (2, 8)]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--domains", help="two of the generator's domains, one for each tenant; none: contrary tenants")
    parser.add_argument("--requests", type=int, default=256, help="of the stream, the last of which are evaluated on")
    parser.add_argument("--every", type=int, default=32, help="requests between two evaluations")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--cost", action="store_true", help="measure CPU time of drafts in place of acceptance")
    options = parse(parser)
    torch.set_num_threads(options.threads)
    if options.cost:
        write_result(__file__, options, {"threads": options.threads, "rank": options.rank, "draft_ms": costs(options)})
        return
    if options.domains:
        parts, vocab, stream, dtype = recorded(options)
    else:
        parts, dtype = TargetParts.of(tiny_target(dtype=torch.float32)), torch.float32
        vocab, stream = torch.arange(VOCAB), contrary(options.requests)
    curves = [compared(parts, vocab, stream, options, seed, dtype) for seed in range(options.seeds)]
    write_result(__file__, options, {"threads": options.threads, "rank": options.rank, "curves": curves})


if __name__ == "__main__":
    main()

"""Tiny models and trajectories served by them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from tensordict import TensorDict
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from aurora_rl.envs import Completion, Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import Drafter, DrafterPolicy, TreeShape


def tiny_target(
    architecture: str = "llama",
    *,
    vocab_size: int = 32,
    num_layers: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> PreTrainedModel:
    """A random causal LM of hidden size 16, for tests.

    Args:
        architecture: "llama" or "qwen3".
        vocab_size: its vocabulary.
        num_layers: its decoder layers.
        dtype: its dtype.
        seed: of its weights.

    Example:
        >>> tiny_target("qwen3").dtype
        torch.float64
    """
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[architecture]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=512,
        # Wide weights: a random model with small ones has nearly flat logits, and everything would agree by chance.
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
    return cast(model, dtype).eval().requires_grad_(False)


def tiny_trajectory(
    drafter: Drafter,
    *,
    architecture: str = "llama",
    prompt_length: int = 5,
    max_new_tokens: int = 12,
    shape: TreeShape | None = None,
    sampling: SamplingParams | None = None,
    request: int = 0,
) -> TensorDict:
    """A packed trajectory, made by serving a tiny target with a drafter; the same at every call.

    Args:
        drafter: made for :func:`tiny_target` (32 tokens, hidden size 16); served as a copy, in its own dtype.
        architecture: of the target.
        prompt_length: ``P``; the prompt follows from ``request``.
        max_new_tokens: length of the completion.
        shape: the trees; None takes a chain of 3.
        sampling: of the request; None samples at temperature 1.
        request: the request's number, at least 0.

    Example:
        >>> from aurora_rl.policies import MedusaDrafter, TargetParts
        >>> drafter = MedusaDrafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> tiny_trajectory(drafter)["sequence", "tokens"].shape
        torch.Size([17])
    """
    prompt = torch.randint(32, (prompt_length,), generator=torch.Generator().manual_seed(request))
    return serve(
        drafter,
        tiny_target(architecture, dtype=dtype_of(drafter)),
        [prompt],
        shape=shape or TreeShape(3),
        max_new_tokens=max_new_tokens,
        sampling=sampling or SamplingParams(temperature=1.0, seed=request),
        first_request=request,
    )[0]


def serve(
    drafter: Drafter,
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    shape: TreeShape,
    max_new_tokens: int = 12,
    num_slots: int = 1,
    sampling: SamplingParams | None = None,
    rule: str = "sample_and_match",
    first_request: int = 0,
    before_round: Callable[[int, DrafterPolicy], None] = lambda turn, policy: None,
) -> list[TensorDict]:
    """Serve prompts speculatively, all rounds drafted, and return their trajectories.

    Args:
        drafter: what drafts; a copy serves, so its cache and modules stay as they are.
        target: the target; a copy serves.
        prompts: each ``[P]`` int64.
        shape: the trees.
        max_new_tokens: length of every completion; nothing else ends one.
        num_slots: slots of the engine.
        sampling: of every request, its seed raised by the number of the prompt; None decodes greedily.
        rule: name of the verification rule.
        first_request: number of the first request.
        before_round: called with the number of each round, from 0 on, and the policy, which it may change.

    Returns:
        One packed trajectory for each prompt, in their order.
    """
    sampling, drafter = sampling or SamplingParams(), copy.deepcopy(drafter)
    engine = TransformersEngine(
        copy.deepcopy(target),
        num_slots=num_slots,
        max_length=max(len(p) for p in prompts) + max_new_tokens,
        feature_layers=drafter.feature_layers,
    )
    requests = iter(
        Request(first_request + i, prompt, max_new_tokens, replace(sampling, seed=sampling.seed + i))
        for i, prompt in enumerate(prompts)
    )
    done: list[Completion] = []
    env = SpecDecodeEnv(
        engine,
        lambda: next(requests, None),
        num_nodes=max(shape.num_nodes, 1),
        rule=rule,
        draft_mode=shape.mode,
        on_completion=done.append,
    )
    policy = DrafterPolicy(
        drafter,
        engine.store,
        num_nodes=env.num_nodes,
        shape=shape,
        vocab_size=engine.vocab_size,
        generator=torch.Generator(engine.store.tokens.device).manual_seed(first_request),
    )
    td, turn = env.reset(), 0
    while env.num_active:
        before_round(turn, policy)
        _, td = env.step_and_maybe_reset(policy(td))
        turn += 1
    done.sort(key=lambda completion: completion.request.id)
    return [completion.trajectory for completion in done if completion.trajectory is not None]


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The model in another dtype, in place."""
    nn.Module.to(model, dtype=dtype)  # transformers wraps `to` in a way that type checkers cannot read
    return model


def dtype_of(drafter: Drafter) -> torch.dtype:
    """The dtype that a drafter computes in; float64 where it has no weights."""
    return next((parameter.dtype for parameter in drafter.parameters()), torch.float64)

"""Tiny models and trajectories served by them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from aurora_rl.envs import Completion, Request, SamplingParams
from aurora_rl.models.target_head import TargetHead
from aurora_rl.policies import Drafter, DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.policies.decoder import SpeculativeDecoder
from aurora_rl.trajectories import pack


def tiny_target(
    architecture: str = "llama",
    *,
    vocab_size: int = 32,
    num_layers: int = 3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> PreTrainedModel:
    """Make a random causal LM of hidden size 16, for tests.

    Args:
        architecture: Model type of transformers, such as "llama" or "qwen3".
        vocab_size: Size of its vocabulary.
        num_layers: Number of its decoder layers.
        dtype: Dtype of its weights.
        seed: Seed of its weights.

    Example:
        >>> tiny_target("qwen3").dtype
        torch.float64
    """
    # Wide weights: a random model with small ones has nearly flat logits, and everything would agree by chance.
    model = _random_model(
        architecture, seed, vocab_size=vocab_size, num_hidden_layers=num_layers, head_dim=4, initializer_range=0.4
    )
    return cast(model, dtype).eval().requires_grad_(False)


def _random_model(
    architecture: str, seed: int, hidden_size: int = 16, eos_token_id: int | None = None, **settings: Any
) -> PreTrainedModel:
    config = AutoConfig.for_model(
        architecture,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        **settings,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def tiny_folder(folder: str | os.PathLike[str], *, num_layers: int = 3) -> Path:
    """Write a random Llama of hidden size 32 over bytes, with tokenizer and chat template, as a Hugging Face folder.

    Args:
        folder: New or empty folder.
        num_layers: Number of its decoder layers.

    Returns:
        The folder, which configurations take as ``model``.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     (tiny_folder(folder) / "config.json").is_file()
        True
    """
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<user>", "<assistant>", "<eos>"]
    backend = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", additional_special_tokens=["<user>", "<assistant>"]
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    eos, shape = tokens.index("<eos>"), {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": num_layers}
    _random_model("llama", 0, eos_token_id=eos, initializer_range=0.2, **shape).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_trajectory(
    drafter: Drafter,
    *,
    architecture: str = "llama",
    prompt_length: int = 5,
    max_new_tokens: int = 12,
    shape: TreeShape | None = None,
    sampling_params: SamplingParams | None = None,
    request: int = 0,
) -> TensorDict:
    """Serve a tiny target with a drafter and return a packed trajectory, the same at every call.

    Args:
        drafter: Drafter of :func:`tiny_target` (32 tokens, hidden size 16); a copy serves, in its own dtype.
        architecture: Architecture of the target.
        prompt_length: Length ``P`` of the prompt, which follows from ``request``.
        max_new_tokens: Length of the completion.
        shape: Trees to draft; None takes a chain of 3.
        sampling_params: Parameters of the request; None samples at temperature 1.
        request: Number of the request, at least 0.

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
        sampling_params=sampling_params or SamplingParams(temperature=1.0, seed=request),
        first_request=request,
    )[0]


def tiny_batch(**options: Any) -> tuple[Drafter, TargetHead, TensorDict]:
    """Return what objectives take: an EAGLE-3 drafter in float64, its target's output head, and a packed batch.

    Args:
        **options: Further arguments of :func:`tiny_trajectory`, which serves the batch's one request.

    Example:
        >>> drafter, head, batch = tiny_batch(max_new_tokens=4)
        >>> len(drafter.draft_vocab), len(head), batch["sequence", "tokens"].shape
        (16, 32, torch.Size([9]))
    """
    parts = TargetParts.of(tiny_target())
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(16)).double()
    return drafter, parts.head, pack([tiny_trajectory(drafter, **options)])


def serve(
    drafter: Drafter,
    target: PreTrainedModel,
    prompts: Sequence[Tensor],
    *,
    shape: TreeShape,
    max_new_tokens: int = 12,
    num_slots: int = 1,
    sampling_params: SamplingParams | None = None,
    rule: str = "sample_and_match",
    first_request: int = 0,
    before_round: Callable[[int, DrafterPolicy], None] = lambda turn, policy: None,
) -> list[TensorDict]:
    """Serve prompts speculatively, all rounds drafted, and return their trajectories.

    Args:
        drafter: The drafter; a copy serves, so its cache and modules stay as they are.
        target: The target; a copy serves.
        prompts: Prompts, each ``[P]`` int64.
        shape: Trees to draft.
        max_new_tokens: Length of every completion; nothing else ends it.
        num_slots: Slots of the engine.
        sampling_params: Parameters of every request, the seed (0 if it has none) raised by the prompt's place; None
            decodes greedily.
        rule: Name of the verification rule.
        first_request: Number of the first request.
        before_round: Called with the number of each round, from 0 on, and the policy, which it may change.

    Returns:
        One packed trajectory for each prompt, in their order.
    """
    params = replace(sampling_params or SamplingParams(), max_tokens=max_new_tokens)
    seed = params.seed or 0
    done: list[Completion] = []
    decoder = SpeculativeDecoder(
        copy.deepcopy(target),
        drafter,
        [Request(first_request + i, p, replace(params, seed=seed + i)) for i, p in enumerate(prompts)],
        shape=shape,
        max_length=max(len(p) for p in prompts) + max_new_tokens,
        num_slots=num_slots,
        seed=first_request,
        rule=rule,
        on_completion=done.append,
    )
    assert decoder.policy is not None
    before_round(0, decoder.policy)
    for turn, _ in enumerate(decoder.rounds(), 1):
        before_round(turn, decoder.policy)
    done.sort(key=lambda completion: completion.request.id)
    return [completion.trajectory for completion in done if completion.trajectory is not None]


def cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Cast the model to another dtype, in place, and return it."""
    nn.Module.to(model, dtype=dtype)  # transformers wraps `to` in a way that type checkers cannot read
    return model


def dtype_of(drafter: Drafter) -> torch.dtype:
    """Return the dtype that a drafter computes in; float64 if it has no weights."""
    return next((parameter.dtype for parameter in drafter.parameters()), torch.float64)

"""The day-0 draft vocabulary: the likeliest tokens of a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.models.target_head import TargetHead, context_length, decoder_of

# Logits that `token_prior` holds at a time: 16 MB in float32.
_PRIOR_LOGITS = 2**22
# Tokens that `token_prior` reads at a time: eager attention, the only one of some families, holds a square of them.
_PRIOR_TOKENS = 512
# Of these it finds out whether the model can read a text in chunks.
_PROBED_TOKENS = 16


@torch.inference_mode()
def token_prior(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """Estimate how often the target will say each token, from prompts alone: ``[V]`` expected counts, float32.

    The estimate is the target's next-token distribution summed over all positions of the prompts, plus the prompts' own
    tokens. The last tokens count of a prompt that is longer than the model's context.
    """
    head, decoder, device = TargetHead.of(model), decoder_of(model), model.device
    context = context_length(model.config.get_text_config())
    prior = torch.zeros(len(head), dtype=torch.float32, device=device)
    # Logits of a few rows at a time: those of a whole prompt would take a megabyte a token at a vocabulary of 152k.
    rows = max(_PRIOR_LOGITS // len(head), 1)
    for prompt in prompts:
        tokens = torch.tensor(prompt if context is None else prompt[-context:], device=device)
        chunked = len(tokens) > _PRIOR_TOKENS and _reads_chunks(decoder, tokens[:_PROBED_TOKENS])
        for hidden in _hidden_states(decoder, tokens.split(_PRIOR_TOKENS) if chunked else [tokens]):
            for part in hidden.split(rows):
                prior += head(part).softmax(-1, dtype=torch.float32).sum(0)
        prior += torch.bincount(tokens, minlength=len(head))
    return prior.cpu()


def _hidden_states(decoder: Any, chunks: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the output head's inputs ``[·, H]`` for each chunk ``[·]`` of a text."""
    cache: dict[str, Any] = {"use_cache": len(chunks) > 1}
    for chunk in chunks:
        out = decoder(chunk[None], **cache)
        if (past := getattr(out, "past_key_values", None)) is not None:
            cache["past_key_values"] = past
        yield out.last_hidden_state[0]


def _reads_chunks(decoder: Any, tokens: Tensor) -> bool:
    """Return whether a decoder reads a text ``[S]`` alike in chunks and in one pass. Some with a state do not."""
    whole = next(_hidden_states(decoder, [tokens]))
    try:
        parts = torch.cat([*_hidden_states(decoder, tokens.tensor_split(2))])
    except Exception:  # families fail in their own ways
        return False
    # A lost context changes states by about their spread, rounding by a few hundredths of it.
    return bool((parts - whole).abs().max() <= 0.1 * whole.float().std())


DRAFT_VOCAB_SIZE = 8192
"""Tokens of a draft vocabulary by default."""


def choose_draft_vocab(size: int, prior: Tensor) -> Tensor:
    """Choose the day-0 draft vocabulary: the tokens of highest prior, and the lowest ids among equals.

    A byte-pair tokenizer numbers its merges in the order of frequency, so low ids are the frequent tokens.

    Args:
        size: Number of rows of the draft head, at most the target's vocabulary.
        prior: Expected counts of :func:`token_prior`, ``[V]``; zeros if there are no prompts yet.

    Returns:
        The chosen tokens, rising, ``[size]`` int64.

    Raises:
        ValueError: ``size`` < 1, or larger than the target's vocabulary.

    Example:
        >>> choose_draft_vocab(2, torch.tensor([0.0, 0.0, 3.0]))
        tensor([0, 2])
    """
    if not 1 <= size <= len(prior):
        raise ValueError(f"drafter.vocab_size must lie in 1..{len(prior)} (the target's vocabulary), got {size}")
    return prior.sort(descending=True, stable=True).indices[:size].sort().values

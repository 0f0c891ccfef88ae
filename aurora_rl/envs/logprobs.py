"""Log-probabilities of the target at delivered tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the target at one delivered token.

    They are those before temperature, min-p, top-k, top-p and logits processors.

    Attributes:
        logprob: Log-probability of the token, in nats.
        top: The likeliest tokens with theirs, likeliest first.
    """

    logprob: float
    top: list[tuple[int, float]]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Return log-probabilities of ``C`` tokens, by the logits ``[C, V]`` at them, with the ``top`` likeliest of each.

    Example:
        >>> found = token_logprobs(torch.tensor([[0.0, 0.0]]), [1], top=1)
        >>> [round(each.logprob, 4) for each in found], [token for each in found for token, _ in each.top]
        ([-0.6931], [0])
    """
    log_probs = logits.float().log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_probs.topk(min(top, logits.shape[-1]), dim=-1)
    columns = zip(own, ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprobs(logprob, list(zip(likeliest, high, strict=True))) for logprob, likeliest, high in columns]

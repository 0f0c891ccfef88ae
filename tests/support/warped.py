"""The served distribution for logits of any shape, by which tests sample as plain decoding does."""

from __future__ import annotations

import torch
from torch import Tensor

from aurora_rl.envs.verification.sampling import warp


def warp_logits(
    logits: Tensor,
    temperature: Tensor | float,
    top_k: Tensor | int = 0,
    top_p: Tensor | float = 1.0,
    min_p: Tensor | float = 0.0,
) -> Tensor:
    """Return log-probabilities ``[..., V]``; the other arguments broadcast to ``[...]``."""
    params = (torch.as_tensor(value, device=logits.device) for value in (temperature, top_k, top_p, min_p))
    rows = (value.expand(logits.shape[:-1]).reshape(-1) for value in params)
    return warp(logits.reshape(-1, logits.shape[-1]), *rows).log_softmax(-1).view(logits.shape)

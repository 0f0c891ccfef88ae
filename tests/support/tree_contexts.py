"""The contexts of draft trees for targets in which a token depends on the two before it."""

from __future__ import annotations

import torch
from torch import Tensor


def contexts(prompt: Tensor, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    """The two tokens before the choice at every column, each `[R, N + 1]`. `prompt` is `[R, 2]`."""
    last = torch.cat([prompt[:, 1:], tokens], 1)
    return torch.cat([prompt[:, :1], last.gather(1, parents + 1)], 1), last

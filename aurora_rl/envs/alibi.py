"""ALiBi by the positions of columns: a tree's nodes lie in another order than their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from aurora_rl.envs.exactness import TRY_SGLANG, UnsupportedModelError
from aurora_rl.models.target_head import decoder_of


class AlibiPositions:
    """Replaces the ALiBi of a decoder that counts positions itself, such as BLOOM's; made by :meth:`of`."""

    def __init__(self, decoder: Any, max_length: int, device: torch.device) -> None:
        self._decoder, self._max_length, self._device = decoder, max_length, device

    @classmethod
    def of(cls, model: PreTrainedModel, max_length: int, *, takes_positions: bool) -> AlibiPositions | None:
        """Return what gives a model's ALiBi its positions; None if the model can be told them (``takes_positions``).

        ``max_length`` is the most columns of a pass.

        Raises:
            UnsupportedModelError: The decoder counts positions itself, in a way that is not known here.
        """
        decoder = decoder_of(model)
        if getattr(type(decoder), "build_alibi_tensor", None) is not None:
            return cls(decoder, max_length, model.device)
        if takes_positions and not getattr(model.config.get_text_config(), "alibi", False):
            return None
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be told the positions of a tree's nodes: its decoder counts them itself; "
            f"{TRY_SGLANG}"
        )

    def aim(self, columns: Tensor) -> None:
        """Let the next pass read positions ``columns`` (``[b, L]``); at every pass, as another engine has its own."""
        self._columns, self._decoder.build_alibi_tensor = columns, self._build

    def _build(self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
        original = type(self._decoder).build_alibi_tensor
        if attention_mask.ndim == 2:  # not one of ours
            return original(self._decoder, attention_mask, num_heads, dtype)
        every = torch.ones(1, self._max_length, dtype=torch.float32, device=self._device)
        table = original(self._decoder, every, num_heads, dtype)[:, 0]
        return table[:, self._columns].transpose(0, 1).flatten(0, 1)[:, None]

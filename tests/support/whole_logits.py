"""A drafter's logits as one tensor, where it gives states and heads to multiply by rows."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def with_whole_logits(function: Any) -> Any:
    """Return ``unroll`` or ``context_logits`` of a drafter with its products carried out."""

    def whole(*args: Any) -> Any:
        found = function(*args)
        return found + 0 if isinstance(found, Tensor) else found._replace(logits=[each + 0 for each in found.logits])

    return whole

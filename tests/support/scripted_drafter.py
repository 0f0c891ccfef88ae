"""A drafter whose drafts are written by a test: it knows the text of each slot, and neither learns nor scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from aurora_rl.policies import Drafter, TargetParts


class ScriptedDrafter(Drafter):
    """``_held`` has the tokens of each slot but the first, which is in no pair. Subclasses write ``propose``."""

    @classmethod
    def from_target(cls, parts: TargetParts, **options: object) -> ScriptedDrafter:
        raise NotImplementedError

    def allocate(self, num_slots: int, max_length: int) -> None:
        self.cached = torch.zeros(num_slots, dtype=torch.int64)
        self._held: list[list[int]] = [[] for _ in range(num_slots)]

    def extend(self, slots: Tensor, tokens: Tensor, features: Tensor, num_new: Tensor) -> None:
        for slot, row, count in zip(slots.tolist(), tokens.tolist(), num_new.tolist(), strict=True):
            self._held[slot] = self._held[slot][: int(self.cached[slot])] + row[1 : count + 1]
        self.cached[slots] += num_new

    def unroll(self, batch: TensorDictBase, steps: int):
        raise NotImplementedError

    def context_logits(self, batch: TensorDictBase, trees: object, wanted: Tensor) -> Tensor:
        raise NotImplementedError

    def published(self) -> dict[str, Tensor]:
        return {}

    def stage(self, weights: dict[str, Tensor]) -> Callable[[], None]:
        raise NotImplementedError

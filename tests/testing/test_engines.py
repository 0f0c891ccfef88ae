"""check_engine names what an engine breaks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aurora_rl.envs import TransformersEngine
from aurora_rl.envs.forward_pass import ForwardPass, Rows
from aurora_rl.testing import check_engine, tiny_target


class WrongFeatures(TransformersEngine):
    def commit(self, *args: Tensor) -> Tensor:
        self._features = self._features.roll(1, 1)
        return super().commit(*args)


class NothingMoved(TransformersEngine):
    def commit(self, slots: Tensor, path: Tensor, tokens: Tensor, num_new: Tensor) -> Tensor:
        features = super().commit(slots, path, tokens, num_new)
        for shape, block in self._pass.cache.blocks.items():
            block[:, slots] = self._saved[shape][:, slots]
        return features

    def verify(self, *args: Tensor) -> Tensor:
        hidden = super().verify(*args)
        self._saved = {shape: block.clone() for shape, block in self._pass.cache.blocks.items()}
        return hidden


class CausalMask(ForwardPass):
    def __call__(self, *rows: Rows) -> list:
        return super().__call__(*(each._replace(seen=None) for each in rows))


class PositionsInARow(ForwardPass):
    def __call__(self, *rows: Rows) -> list:
        return super().__call__(
            *(each._replace(depth=torch.arange(each.depth.shape[1]).expand_as(each.depth)) for each in rows)
        )


class WrongHead(TransformersEngine):
    def logits(self, hidden: Tensor) -> Tensor:
        return super().logits(hidden).roll(1, -1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (WrongFeatures, "features that commit gave for slot 0"),
        (NothingMoved, "hidden, slot"),
        (CausalMask, "hidden, slot"),
        (PositionsInARow, "hidden, slot"),
        (WrongHead, "logits, slot"),
    ],
)
def test_check_names_what_an_engine_breaks(kind: type, message: str) -> None:
    engine = TransformersEngine(tiny_target(), num_slots=3, max_length=64, feature_layers=(0, 2))
    broken = engine._pass if issubclass(kind, ForwardPass) else engine
    broken.__class__ = kind  # not before: the engine's own check would refuse what is broken
    with pytest.raises(AssertionError, match=message):
        check_engine(engine, tiny_target(), feature_layers=(0, 2))


def test_check_catches_layers_in_another_order() -> None:
    engine = TransformersEngine(tiny_target(), num_slots=1, max_length=64, feature_layers=(2, 0))
    with pytest.raises(AssertionError, match="features"):
        check_engine(engine, tiny_target(), feature_layers=(0, 2))

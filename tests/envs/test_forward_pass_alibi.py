"""AlibiPositions: a bias by the positions of columns, whatever their order."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM

from aurora_rl.envs.exactness import UnsupportedModelError
from aurora_rl.envs.forward_pass import AlibiPositions
from aurora_rl.testing import tiny_target


def test_columns_have_the_bias_of_their_positions() -> None:
    model = BloomForCausalLM(BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=4))
    decoder = model.transformer
    own = decoder.build_alibi_tensor(torch.ones(1, 6), 4, torch.float32)  # [heads, 1, positions]
    alibi = AlibiPositions.of(model, 6, takes_positions=False)
    assert alibi is not None
    columns = torch.tensor([[0, 1, 3, 2], [4, 4, 0, 5]])
    alibi.aim(columns)
    placed = decoder.build_alibi_tensor(torch.ones(2, 4, 4), 4, torch.float32)
    for row in range(2):
        assert torch.equal(placed[row * 4 : row * 4 + 4, 0], own[:, 0, columns[row]])
    assert torch.equal(decoder.build_alibi_tensor(torch.ones(1, 6), 4, torch.float32), own)  # a mask that is not ours


def test_a_model_that_is_told_positions_needs_none_and_one_that_counts_them_is_refused() -> None:
    assert AlibiPositions.of(tiny_target(), 8, takes_positions=True) is None
    with pytest.raises(UnsupportedModelError, match="cannot be told the positions of a tree's nodes"):
        AlibiPositions.of(tiny_target(), 8, takes_positions=False)

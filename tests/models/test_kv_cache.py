"""The slot cache: what was written is read back, of whichever slots."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from aurora_rl.models.kv_cache import PassPart, SlotCache, sliding_window, uniform_shapes


def cache(columns: int = 3) -> SlotCache:
    config = LlamaConfig(hidden_size=2, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1)
    return SlotCache(uniform_shapes(config), 4, columns, torch.float32, torch.device("cpu"))


def write(held: SlotCache, slots: list[int], values: list[float]) -> list[float]:
    """Write a value at column 0 of each slot, and return what the pass reads there."""
    rows = torch.tensor(values)[:, None, None, None].expand(-1, 1, 1, 2)
    held.aim(PassPart(torch.tensor(slots), torch.zeros(len(slots), 1, dtype=torch.int64), 1))
    keys, read = held.update(rows, rows + 100, 0)
    assert torch.equal(read, keys + 100)
    return keys[:, 0, 0, 0].tolist()


# The third has the ends of a run of neighbours, and is none.
@pytest.mark.parametrize("slots", [[1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3], [2], [0, 3]])
def test_slots_are_read_in_the_order_that_was_asked_for(slots: list[int]) -> None:
    values = [10.0 + slot for slot in slots]
    assert write(cache(), slots, values) == values


def test_widening_keeps_what_is_held() -> None:
    held = cache(columns=1)
    write(held, [0, 1, 2, 3], [5.0, 6.0, 7.0, 8.0])
    held.widen(4)
    (block,) = held.blocks.values()
    assert held.columns == 4 and block[0, :, 0, 0, 0].tolist() == [5.0, 6.0, 7.0, 8.0]
    held.widen(2)
    assert held.columns == 4


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (LlamaConfig(), None),
        (MistralConfig(sliding_window=7), 7),
        (Qwen2Config(sliding_window=7, use_sliding_window=False), None),
        (Qwen2Config(sliding_window=7, use_sliding_window=True, max_window_layers=1), 7),
    ],
)
def test_a_window_counts_where_a_layer_slides(config: PretrainedConfig, window: int | None) -> None:
    assert sliding_window(config) == window

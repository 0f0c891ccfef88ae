"""Features of served texts are found by a beginning, forgotten beyond a size, and deleted by tenant."""

from __future__ import annotations

import torch

from aurora_rl.envs.remote.feature_store import FeatureStore


def test_the_store_forgets_the_least_recently_used() -> None:
    store = FeatureStore(2 * 3 * 4 * 4)
    texts = [torch.tensor([n, 1, 2]) for n in range(3)]
    for version, text in enumerate(texts[:2]):
        store.put(text, torch.zeros(3, 4), version)
    assert store.get(texts[0][:1]) is not None
    store.put(texts[2], torch.zeros(3, 4), 2)
    assert [store.get(text) is not None for text in texts] == [True, False, True]
    store.put(texts[2], torch.zeros(3, 4), 7)  # once more: counted once
    assert store.get(texts[2])[1] == 7 and store.get(texts[0]) is not None


def test_the_stores_size_is_that_of_what_it_keeps() -> None:
    store = FeatureStore(1 << 10)
    for number, tenant in enumerate("aab"):
        store.put(torch.tensor([number]), torch.zeros(1, 4), 0, tenant)
    store.delete("a")
    assert store._bytes == 16 and list(store._texts.values())[0][3] == "b"

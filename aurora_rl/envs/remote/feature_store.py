"""Features of texts that were served, in host memory."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor


class FeatureStore:
    """Features of served texts, for prompts whose beginning an engine takes from its prefix cache and does not run.

    Least recently used texts are dropped beyond ``max_bytes``.

    Example:
        >>> store = FeatureStore(1 << 20)
        >>> store.put(torch.tensor([5, 6, 7]), torch.zeros(3, 4), version=2)
        >>> features, version = store.get(torch.tensor([5, 6]))
        >>> features.shape, version
        (torch.Size([2, 4]), 2)
        >>> store.get(torch.tensor([5, 9])) is None
        True
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._texts: OrderedDict[bytes, tuple[Tensor, Tensor, int, str | None]] = OrderedDict()

    def put(self, tokens: Tensor, features: Tensor, version: int, tenant: str | None = None) -> None:
        """Keep the features ``[n, F]`` of a tenant's tokens ``[n]``, with the version of the weights that drafted."""
        key = tokens.numpy().tobytes()
        if key in self._texts:
            self._bytes -= self._texts.pop(key)[1].nbytes
        self._texts[key] = tokens, features, version, tenant
        self._bytes += features.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._texts.popitem(last=False)[1][1].nbytes

    def get(self, prefix: Tensor) -> tuple[Tensor, int] | None:
        """Return the features and version of a text that begins with ``prefix`` ``[k]``; None if there is none."""
        k = len(prefix)
        for key in reversed(self._texts):
            tokens, features, version, _ = self._texts[key]
            if len(tokens) >= k and torch.equal(tokens[:k], prefix):
                self._texts.move_to_end(key)
                return features[:k], version
        return None

    def delete(self, tenant: str) -> None:
        """Drop a tenant's texts."""
        for key in [key for key, (*_, whose) in self._texts.items() if whose == tenant]:
            self._bytes -= self._texts.pop(key)[1].nbytes

"""Rows of finished requests, by their tokens, which a request that begins alike need not compute again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from aurora_rl.tenants import tenant_of_salt


class _Kept(NamedTuple):
    """A text, its rows, and the salt of the request that left them."""

    text: np.ndarray
    rows: list[Tensor]
    salt: str | None


class PrefixCache:
    """Copies of rows that depend on nothing but the tokens before them, such as keys and values.

    Requests that resend a conversation begin with the tokens of the turn before. Copies are kept of whole texts, least
    recently used first; a text that begins another is dropped for it. A request finds what requests of its own salt
    left, and all salts together are held to one bound.

    Args:
        max_tokens: Most tokens whose rows are kept. A longer text is kept up to it.

    Attributes:
        queries: Tokens that rows were asked for, as vLLM's metric ``prefix_cache_queries``.
        hits: Tokens whose rows were there, as vLLM's metric ``prefix_cache_hits``.
        num_tokens: Tokens whose rows are kept now.

    Raises:
        ValueError: ``max_tokens`` is less than 1.

    Example:
        >>> cache, rows = PrefixCache(max_tokens=8), torch.arange(5.0)
        >>> cache.save(torch.tensor([7, 8, 9]), [rows])
        >>> fresh = torch.zeros(5)
        >>> cache.load(torch.tensor([7, 8, 5]), [fresh]), fresh
        (2, tensor([0., 1., 0., 0., 0.]))
    """

    def __init__(self, max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; leave the cache out to keep nothing")
        self.max_tokens, self.queries, self.hits, self.num_tokens = max_tokens, 0, 0, 0
        self._kept: list[_Kept] = []  # the least recently used first

    def save(self, tokens: Tensor, rows: Sequence[Tensor], salt: str | None = None) -> None:
        """Keep copies of the rows of a text.

        Args:
            tokens: The text, ``[n]`` int64.
            rows: Tensors ``[>= n, ...]``; row ``t`` depends on tokens ``0 .. t`` alone.
            salt: The request's salt; None if it has none.
        """
        text = tokens[: self.max_tokens].cpu().numpy().copy()
        longest, place = self._longest(text, salt)
        if longest == len(text):
            if len(text):
                self._kept.append(self._kept.pop(place))
            return
        self._kept = [each for each in self._kept if each.salt != salt or _common(each.text, text) < len(each.text)]
        while (kept := sum(len(each.text) for each in self._kept)) + len(text) > self.max_tokens:
            del self._kept[0]
        self._kept.append(_Kept(text, [row[: len(text)].clone() for row in rows], salt))
        self.num_tokens = kept + len(text)

    @torch.inference_mode()
    def load(self, tokens: Tensor, rows: Sequence[Tensor], salt: str | None = None) -> int:
        """Copy the longest kept beginning of a text into ``rows``, as they were saved, and return its length."""
        count, place = self._longest(tokens.cpu().numpy(), salt)
        self.queries, self.hits = self.queries + len(tokens), self.hits + count
        if count:
            kept = self._kept.pop(place)
            self._kept.append(kept)
            for row, saved in zip(rows, kept.rows, strict=True):
                row[:count] = saved[:count]
        return count

    def clear(self) -> None:
        """Drop all rows."""
        self._kept, self.num_tokens = [], 0

    def delete(self, tenant: str) -> int:
        """Drop the rows that a tenant's requests left, and return of how many texts they were."""
        kept = [each for each in self._kept if tenant_of_salt(each.salt) != tenant]
        deleted, self._kept = len(self._kept) - len(kept), kept
        self.num_tokens = sum(len(each.text) for each in kept)
        return deleted

    def _longest(self, text: np.ndarray, salt: str | None) -> tuple[int, int]:
        """Return the length of the longest beginning that is kept of a text, and its place, the latest of several."""
        found = ((_common(each.text, text), place) for place, each in enumerate(self._kept) if each.salt == salt)
        return max(found, default=(0, 0))


def _common(first: np.ndarray, second: np.ndarray) -> int:
    """Return how many tokens two texts begin with alike."""
    count = min(len(first), len(second))
    differ = np.flatnonzero(first[:count] != second[:count])
    return int(differ[0]) if len(differ) else count

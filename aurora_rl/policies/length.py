"""How deep to draft, from measured acceptance and measured cost."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Rounds over which the time beside drafting and verification is averaged.
_RECENT = 40
# Depths that promise this share of the best one's tokens per second are as good as the best.
_AS_GOOD = 0.99


class LengthController:
    """Chooses the depth with the most expected tokens per second.

    With ``a[d]`` the chance that depth ``d`` is accepted where depth ``d - 1`` was, a round of depth ``L`` delivers
    ``E[L] = 1 + sum over d <= L of a[1] * ... * a[d]`` tokens and takes ``costs[L]`` seconds, and what a round takes
    beside drafting and verification at any depth. Depths that were not tried yet are taken to be as good as the deepest
    that was, so a chain lengthens one step at a time and is tried.

    Args:
        costs: seconds of a round of depth 0, 1, ..., as measured on this machine; at least two entries.
        memory: rounds over which measurements fade.

    Example:
        >>> import torch
        >>> length = LengthController([1.0, 1.1, 1.2, 1.3])
        >>> length.depth
        1
        >>> for _ in range(50):
        ...     length.observe(torch.tensor([length.depth]), torch.tensor([length.depth]))
        >>> length.depth
        3
    """

    def __init__(self, costs: Sequence[float], *, memory: int = 400) -> None:
        if len(costs) < 2:
            raise ValueError(f"costs of at least depth 0 and 1 are needed, got {list(costs)}")
        self._costs, self._keep = list(costs), 1 - 1 / memory
        # The prior: one acceptance in four at depth 1, worth eight observations.
        self._hits = [2.0] + [0.0] * (len(costs) - 2)
        self._trials = [8.0] + [0.0] * (len(costs) - 2)
        self._beside = 0.0
        self.depth = 1

    @property
    def acceptance(self) -> list[float]:
        """``a[1], a[2], ...`` up to the deepest depth with enough trials."""
        return [h / t for h, t in zip(self._hits, self._trials, strict=True) if t >= 8]

    def observe(self, accepted: Tensor, drafted: Tensor, seconds: float | None = None) -> None:
        """Take in a round of the current depth.

        Args:
            accepted: ``[b]`` int64, accepted depth of each slot.
            drafted: ``[b]`` int64, drafted depth.
            seconds: wall time of the round; None where it was not measured.
        """
        if seconds is not None:
            # Clipped: one round that the machine held up says nothing about the others.
            beside = min(max(seconds - self._costs[self.depth], 0.0), self._costs[0])
            self._beside += (beside - self._beside) / _RECENT
        # Every depth fades at every round, tried or not: one that was given up is forgotten in time, and tried again.
        self._hits = [h * self._keep for h in self._hits]
        self._trials = [t * self._keep for t in self._trials]
        for hits, depth in zip(accepted.tolist(), drafted.tolist(), strict=True):
            for d in range(min(depth, hits + 1, len(self._hits))):
                self._hits[d] += d < hits
                self._trials[d] += 1
        self.depth = self._best()

    def _best(self) -> int:
        known = self.acceptance
        reach, tokens, rates = 1.0, 1.0, {}
        for depth in range(1, min(len(known) + 1, len(self._costs) - 1) + 1):
            reach *= known[min(depth, len(known)) - 1]
            tokens += reach
            rates[depth] = tokens / (self._costs[depth] + self._beside)
        # Of depths that are as good the deepest: what it drafts is tried and recorded, hence measured and learned from.
        return max(depth for depth in rates if rates[depth] >= _AS_GOOD * max(rates.values()))

"""Measures of learning speed, from the committed tokens and verification rounds of each request of a stream.

A stream is served in one order, and an arm is one way to draft for it, so that arms differ in rounds alone. Definitions
for citation are in docs/adaptation.md.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

REGAINED = 0.95
"""Share of the level of before that counts as regained."""
SETTLED = 1 / 3
"""Last share of a phase, whose acceptance is the phase's level."""
_BLOCK = 8  # neighbouring requests that the bootstrap draws at once


@dataclass(frozen=True, slots=True)
class StreamCounts:
    """What the requests of a stream took with one arm, in order.

    Attributes:
        tokens: Committed tokens of each request.
        rounds: Verification rounds of each request.

    Raises:
        ValueError: The two differ in length, or a request has more rounds than tokens, or none.

    Example:
        >>> StreamCounts([6, 4], [3, 4]).acceptance_length()
        1.4285714285714286
    """

    tokens: Sequence[int]
    rounds: Sequence[int]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.rounds):
            raise ValueError(f"{len(self.tokens)} requests have tokens, and {len(self.rounds)} have rounds")
        for request, (tokens, rounds) in enumerate(zip(self.tokens, self.rounds, strict=True)):
            if not 1 <= rounds <= tokens:
                raise ValueError(
                    f"request {request} has {tokens} tokens in {rounds} rounds; a round commits at least 1"
                )

    def __len__(self) -> int:
        return len(self.tokens)

    def part(self, first: int, end: int) -> StreamCounts:
        """Return the requests from ``first`` to before ``end``."""
        return StreamCounts(self.tokens[first:end], self.rounds[first:end])

    def acceptance_length(self) -> float:
        """Return tokens per round over all requests, bonus tokens included."""
        return sum(self.tokens) / sum(self.rounds)


def trailing_acceptance(counts: StreamCounts, window: int) -> list[float]:
    """Return the acceptance length over the last ``window`` requests, after each request from the first full window on.

    Example:
        >>> trailing_acceptance(StreamCounts([2, 2, 4], [2, 1, 2]), window=2)
        [1.3333333333333333, 2.0]
    """
    tokens, rounds = ([0, *accumulate(values)] for values in (counts.tokens, counts.rounds))
    return [
        (tokens[end] - tokens[end - window]) / (rounds[end] - rounds[end - window])
        for end in range(window, len(counts) + 1)
    ]


def requests_to(counts: StreamCounts, level: float, window: int) -> int | None:
    """Return after how many requests the trailing acceptance reaches a level for the first time; None if never.

    Example:
        >>> requests_to(StreamCounts([2, 2, 4], [2, 1, 2]), level=2.0, window=2)
        3
    """
    curve = trailing_acceptance(counts, window)
    return next((window + place for place, acceptance in enumerate(curve) if acceptance >= level), None)


def level(counts: StreamCounts) -> float:
    """Return the acceptance length that a phase has come to: that over its last third.

    Example:
        >>> level(StreamCounts([1, 1, 3], [1, 1, 1]))
        3.0
    """
    return counts.part(len(counts) - max(int(len(counts) * SETTLED), 1), len(counts)).acceptance_length()


def forgotten(first: StreamCounts, again: StreamCounts) -> float:
    """Return the share of a phase's level that is lost when the same traffic comes back: over all of ``again``.

    Example:
        >>> forgotten(StreamCounts([2, 2, 2], [1, 1, 1]), StreamCounts([2, 2], [2, 1]))
        0.33333333333333337
    """
    return 1 - again.acceptance_length() / level(first)


def regret(counts: StreamCounts, fixed: Mapping[str, StreamCounts]) -> tuple[str, float]:
    """Return the fixed arm that is best in hindsight, and the rounds that an arm took above its, as a share of these.

    Example:
        >>> plain, lookup, arm = (StreamCounts([4, 4], rounds) for rounds in ([4, 4], [2, 2], [3, 2]))
        >>> regret(arm, {"plain": plain, "lookup": lookup})
        ('lookup', 0.25)
    """
    best = min(fixed, key=lambda name: sum(fixed[name].rounds))
    return best, sum(counts.rounds) / sum(fixed[best].rounds) - 1


def block_bootstrap(arm: StreamCounts, reference: StreamCounts, *, samples: int = 2000) -> tuple[float, float] | None:
    """Return a 95% interval of the ratio of an arm's acceptance length to a reference's on the same requests.

    Blocks of eight neighbouring requests are drawn with replacement, since neighbours were served by the same
    weights (Künsch 1989, the moving-block bootstrap). There is no interval with fewer requests than four blocks.

    Example:
        >>> same = StreamCounts([4] * 32, [2] * 32)
        >>> block_bootstrap(same, same)
        (1.0, 1.0)
    """
    draw, count = random.Random(0), len(arm)
    if count < 4 * _BLOCK:
        return None
    sums = [
        tuple(
            sum(part[first : first + _BLOCK]) for part in (arm.tokens, arm.rounds, reference.tokens, reference.rounds)
        )
        for first in range(count - _BLOCK + 1)
    ]
    ratios = []
    for _ in range(samples):
        tokens, rounds, reference_tokens, reference_rounds = (
            sum(values) for values in zip(*draw.choices(sums, k=-(-count // _BLOCK)), strict=True)
        )
        ratios.append((tokens / rounds) / (reference_tokens / reference_rounds))
    ratios.sort()
    return ratios[int(0.025 * samples)], ratios[int(0.975 * samples)]

"""Statistics of a serving run, whichever engine serves it."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any

from aurora_rl.telemetry.rates import Rates, Round, Rounds, rates


class Finished:
    """Tokens and rounds of the completed requests, in order and in bounded memory: sums over neighbours.

    Once ``buckets`` requests have completed, two neighbours share a sum, then four, and so on. Its length is the number
    of requests.

    Args:
        buckets: The most sums, an even number; there are at least half as many in a long run.

    Example:
        >>> finished = Finished(buckets=2)
        >>> for tokens in (3, 4, 5):
        ...     finished.append(tokens, rounds=2)
        >>> len(finished), list(finished)
        (3, [(7, 4), (5, 2)])
    """

    def __init__(self, buckets: int = 1024) -> None:
        self._buckets, self._width, self._count = buckets, 1, 0  # the width is in requests
        self._sums: list[tuple[int, int]] = []

    def append(self, tokens: int, rounds: int) -> None:
        """Add a request."""
        if self._count == self._buckets * self._width:
            pairs = zip(self._sums[::2], self._sums[1::2], strict=True)
            self._sums = [(first[0] + second[0], first[1] + second[1]) for first, second in pairs]
            self._width *= 2
        if self._count % self._width == 0:
            self._sums.append((0, 0))
        before = self._sums[-1]
        self._sums[-1] = before[0] + tokens, before[1] + rounds
        self._count += 1

    def acceptance(self, first: int, last: int) -> float | None:
        """Return the acceptance length of requests ``first`` to ``last - 1``, and of those that share their sums."""
        part = self._sums[first // self._width : -(-last // self._width)]
        tokens, rounds = sum(t for t, _ in part), sum(r for _, r in part)
        return tokens / rounds if rounds else None

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._sums)


class Stats:
    """Counts of a serving run, and the summary made of them.

    Args:
        version: Version of the weights that draft first; None if nothing drafts yet.

    Attributes:
        rounds: Rounds so far. By default sums over rounds that are alike (:class:`Rounds`), so that memory does not
            grow with them; assign a list to keep every round.
        finished: Tokens and rounds of speculation of the completed requests, in order of completion. What grows with a
            run are a few numbers a swap.
        domains: Requests, tokens, and tokens and rounds of speculation of the completed requests of each domain.
        swap_ms: Milliseconds that serving stood still at each swap.
        versions: Versions of the weights that have drafted.
        drafted: Rounds by what they drafted: tree, chain, ngrams, plain (the controller drafted nothing) or baseline.
        drafter_faults: Requests that went on without the drafter because it failed or its tree was malformed.
    """

    def __init__(self, version: int | None = None) -> None:
        self.rounds: Rounds | list[Round] = Rounds()
        self.finished = Finished()
        self.domains: dict[str, Counter[str]] = {}
        self.swap_ms: list[float] = []
        self.versions: list[int] = [] if version is None else [version]
        self.drafted: Counter[str] = Counter()
        self.drafter_faults = 0

    @property
    def version(self) -> int:
        """Version of the weights that draft now."""
        return self.versions[-1]

    def rates(self, share: float = 1.0) -> Rates:
        """Return tokens per second of both kinds over the last ``share`` of the requests.

        The part begins with a whole bucket of :class:`Rounds`: where more than a thousand requests have completed it
        may be shorter by up to two thousandths of them.
        """
        first = len(self.finished) * (1 - share)
        return rates(r for r in self.rounds if r.request >= first)

    def acceptance(self, first: int, last: int) -> float | None:
        """Return the acceptance length, with bonus token, of the requests completed as ``first`` to ``last - 1``.

        Where more than a thousand requests have completed, each end of the part may be off by two thousandths of them.
        """
        return self.finished.acceptance(first, last)

    @property
    def last_acceptance(self) -> float | None:
        """The acceptance length of the last tenth of the requests: of eight at least, but of no more than half."""
        count = len(self.finished)
        return self.acceptance(count - self._tenth, count)

    @property
    def _tenth(self) -> int:
        count = len(self.finished)
        return max(count // 10, min(8, -(-count // 2)))

    def finish(
        self, domain: str, tokens: int, speculative_tokens: int, speculative_rounds: int, requests: int = 1
    ) -> None:
        """Count completed requests: all their tokens, and those of their speculative rounds.

        Of several requests only the sums are known: each gets an equal share in :attr:`finished`.
        """
        for done in range(requests):
            tokens_share, rounds_share = (
                total * (done + 1) // requests - total * done // requests
                for total in (speculative_tokens, speculative_rounds)
            )
            self.finished.append(tokens_share, rounds_share)
        self.domains.setdefault(domain, Counter()).update(
            requests=requests, tokens=tokens, speculative=speculative_tokens, rounds=speculative_rounds
        )

    def summary(
        self, *, client_requests: int = 0, failed: int = 0, drops: Counter[str] | None = None, duration_s: float = 0.0
    ) -> dict[str, Any]:
        """Return what ``summary.json`` holds; null stands for what was not measured.

        ``client_requests`` are those completed requests that clients asked, and no traffic; ``drops`` the trajectories
        that were lost, by reason.
        """
        count, drops = len(self.finished), drops or Counter()
        last = self.rates(0.25)
        domains = {
            name: {
                "requests": c["requests"],
                "tokens": c["tokens"],
                "acceptance_length": c["speculative"] / c["rounds"] if c["rounds"] else None,
            }
            for name, c in sorted(self.domains.items())
        }
        return {
            "requests": count,
            "client_requests": client_requests,
            "failed": failed,
            "swaps": len(self.swap_ms),
            "swap_ms": {
                "p50": statistics.median(self.swap_ms) if self.swap_ms else None,
                "max": max(self.swap_ms, default=None),
            },
            "acceptance_length": {"first": self.acceptance(0, self._tenth), "last": self.last_acceptance},
            "domains": domains if any(domains) else {},  # the only name may be the empty one
            "tokens_per_second": {"baseline": last.baseline, "speculative": last.speculative},
            "speedup": last.speedup,
            "baseline_rounds": last.baseline_rounds,
            "dropped_trajectories": drops.total(),
            "dropped_by_reason": dict(drops),
            "drafter_faults": self.drafter_faults,
            "duration_s": duration_s,
            "versions_served": self.versions,
        }

"""Statistics of a serving run, whichever engine serves it."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

from aurora_rl.telemetry.rates import Rates, Round, Rounds, rates


class Stats:
    """Counts of a serving run, and the summary made of them.

    Args:
        version: Version of the weights that draft first; None if nothing drafts yet.

    Attributes:
        rounds: Rounds so far. By default sums over rounds that are alike (:class:`Rounds`), so that memory does not
            grow with them; assign a list to keep every round.
        finished: Tokens and rounds of speculation of each completed request, in order of completion. These two numbers
            a request, and a few a swap, are all that grows with a run.
        domains: Requests, tokens, and tokens and rounds of speculation of the completed requests of each domain.
        swap_ms: Milliseconds that serving stood still at each swap.
        versions: Versions of the weights that have drafted.
        drafted: Rounds by what they drafted: tree, chain, ngrams, plain (the controller drafted nothing) or baseline.
        drafter_faults: Requests that went on without the drafter because it failed or its tree was malformed.
    """

    def __init__(self, version: int | None = None) -> None:
        self.rounds: Rounds | list[Round] = Rounds()
        self.finished: list[tuple[int, int]] = []
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
        """Return the acceptance length, with bonus token, of the requests completed as ``first`` to ``last - 1``."""
        part = self.finished[first:last]
        tokens, rounds = sum(t for t, _ in part), sum(r for _, r in part)
        return tokens / rounds if rounds else None

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
            self.finished.append((tokens_share, rounds_share))
        self.domains.setdefault(domain, Counter()).update(
            requests=requests, tokens=tokens, speculative=speculative_tokens, rounds=speculative_rounds
        )

    def summary(
        self,
        *,
        client_requests: int = 0,
        failed: int = 0,
        drops: Counter[str] | None = None,
        duration_s: float = 0.0,
    ) -> dict[str, Any]:
        """Return what ``summary.json`` holds; null stands for what was not measured.

        ``client_requests`` are those completed requests that clients asked, and no traffic; ``drops`` the trajectories
        that were lost, by reason.
        """
        count, drops = len(self.finished), drops or Counter()
        tenth = max(count // 10, 1)
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
            "acceptance_length": {
                "first": self.acceptance(0, tenth),
                "last": self.acceptance(max(count - tenth, 0), count),
            },
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

"""Sums over the requests that a plugin recorded, for its status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tensordict import TensorDictBase

from aurora_rl.trajectories import acceptance_length, accepted_per_round


@dataclass(frozen=True, slots=True)
class RecordedTotals:
    """Sums over recorded requests."""

    requests: int = 0
    terminated: int = 0  # ended by themselves, not by their budget
    prompt_tokens: int = 0
    tokens: int = 0  # tokens of completions
    speculative_tokens: int = 0  # tokens from speculative rounds, bonus tokens included
    speculative_rounds: int = 0
    drafted_tokens: int = 0
    accepted: Mapping[int, int] = field(default_factory=dict)  # rounds by the number of drafts that they accepted

    @property
    def acceptance_length(self) -> float | None:
        """Tokens per speculative round; None before the first."""
        return self.speculative_tokens / self.speculative_rounds if self.speculative_rounds else None

    @classmethod
    def of(cls, trajectory: TensorDictBase) -> RecordedTotals:
        """Return the sums over a trajectory's completion and rounds; they count no request and no prompt.

        Example:
            >>> from aurora_rl.testing import tiny_batch
            >>> from aurora_rl.trajectories import unpack
            >>> trajectory = unpack(tiny_batch()[2])[0]
            >>> sums = RecordedTotals.of(trajectory)
            >>> sums.drafted_tokens == len(trajectory["nodes", "tokens"]), sums.requests
            (True, 0)
        """
        tokens, rounds = acceptance_length(trajectory)
        accepted, drafted = accepted_per_round(trajectory)
        return cls(
            tokens=len(trajectory["sequence", "tokens"]) - int(trajectory["sequence", "prompt_length"]),
            speculative_tokens=tokens,
            speculative_rounds=rounds,
            drafted_tokens=int(drafted.sum()),
            accepted=dict(Counter(accepted[drafted > 0].tolist())),
        )

    def plus(self, added: RecordedTotals) -> RecordedTotals:
        """Return the sums of both."""
        return RecordedTotals(
            requests=self.requests + added.requests,
            terminated=self.terminated + added.terminated,
            prompt_tokens=self.prompt_tokens + added.prompt_tokens,
            tokens=self.tokens + added.tokens,
            speculative_tokens=self.speculative_tokens + added.speculative_tokens,
            speculative_rounds=self.speculative_rounds + added.speculative_rounds,
            drafted_tokens=self.drafted_tokens + added.drafted_tokens,
            accepted=dict(Counter(self.accepted) + Counter(added.accepted)),
        )

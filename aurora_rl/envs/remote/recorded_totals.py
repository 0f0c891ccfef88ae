"""Sums over the requests that a plugin recorded, for its status."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tensordict import TensorDict

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

    def plus(self, trajectory: TensorDict, terminated: bool) -> RecordedTotals:
        """Return the sums with one more request."""
        tokens, rounds = acceptance_length(trajectory)
        accepted, drafted = accepted_per_round(trajectory)
        prompt = int(trajectory["sequence", "prompt_length"])
        return RecordedTotals(
            requests=self.requests + 1,
            terminated=self.terminated + terminated,
            prompt_tokens=self.prompt_tokens + prompt,
            tokens=self.tokens + len(trajectory["sequence", "tokens"]) - prompt,
            speculative_tokens=self.speculative_tokens + tokens,
            speculative_rounds=self.speculative_rounds + rounds,
            drafted_tokens=self.drafted_tokens + int(drafted.sum()),
            accepted=dict(Counter(self.accepted) + Counter(accepted[drafted > 0].tolist())),
        )

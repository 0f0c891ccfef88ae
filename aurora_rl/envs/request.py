"""Requests and completions, as environments and engines see them: in tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from tensordict import TensorDict
from torch import Tensor

from aurora_rl.sampling_params import SamplingParams


@dataclass(slots=True)
class Request:
    """One request for a completion.

    Attributes:
        id: Number of the request, not negative, as the trajectory carries it.
        prompt: Tokens of the prompt, at least one, ``[P]`` int64.
        sampling: Temperature, top-k, top-p, seed, token budget and stop strings.

    Example:
        >>> import torch
        >>> Request(0, torch.tensor([3, 4, 5]), SamplingParams(max_tokens=8)).sampling.max_tokens
        8
    """

    id: int
    prompt: Tensor
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that ended.

    Attributes:
        request: The request.
        tokens: Tokens of the completion, the stop token included, ``[C]`` int64.
        terminated: Whether it ended at a stop token or string, and not at its token budget.
        trajectory: Trajectory of the request; None if nothing was recorded.
        acceptance_length: Tokens that a round with drafts added on average; None if there was no such round.
        text: The tokens as text, without a stop string, if :class:`aurora_rl.LLM` served the request.
        error: Why the request was not served; None if it was.

    Example:
        >>> import torch
        >>> Completion(Request(0, torch.tensor([3])), torch.tensor([4, 5]), terminated=True).finish_reason
        'stop'
    """

    request: Request
    tokens: Tensor
    terminated: bool
    trajectory: TensorDict | None = None
    acceptance_length: float | None = None
    text: str = ""
    error: str | None = None

    @property
    def finish_reason(self) -> str:
        """Why it ended: "stop", "length" or "error"."""
        return "error" if self.error is not None else "stop" if self.terminated else "length"

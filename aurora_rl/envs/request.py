"""Requests and completions, as environments and engines see them: in tokens."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.sampling_params import SamplingParams
from aurora_rl.tenants import joint_salt


@dataclass(slots=True)
class Request:
    """One request for a completion.

    Attributes:
        id: Number of the request, not negative, as the trajectory carries it.
        prompt: Tokens of the prompt, at least one, ``[P]`` int64.
        sampling_params: Parameters of its one completion. A sampled request without a seed draws one when it is made.
            So each copy of a prompt has its own, and a trajectory has the one that it was served with.
        speculative: Whether drafts are verified for it. False decodes it plainly; the text is the same.
        learn: Whether a server may send its trajectory to the learner.
        counted: Whether a server's statistics count it.
        cache_salt: Key of sharing. Requests share cached prefixes and answers to look up only if their salts are equal;
            None is a salt too.
        tenant: Name of the tenant. Tenants share nothing, whatever their salts; None names none.

    Raises:
        ValueError: The parameters ask for several completions, or have no token budget.

    Example:
        >>> import torch
        >>> Request(0, torch.tensor([3, 4, 5]), SamplingParams(max_tokens=8)).sampling_params.max_tokens
        8
    """

    id: int
    prompt: Tensor
    sampling_params: SamplingParams = field(default_factory=SamplingParams)
    speculative: bool = True
    learn: bool = True
    counted: bool = True
    cache_salt: str | None = None
    tenant: str | None = None

    def __post_init__(self) -> None:
        if (n := self.sampling_params.n) != 1:
            raise ValueError(f"n is {n}; a request has one completion: make one for each of sampling_params.copies()")
        _ = self.sampling_params.token_budget  # raises if there is none
        if self.sampling_params.seed is None and self.sampling_params.temperature > 0:
            self.sampling_params = replace(self.sampling_params, seed=secrets.randbits(63))

    @property
    def salt(self) -> str | None:
        """Key of what it shares: its own ``cache_salt`` among its tenant's requests."""
        return joint_salt(self.tenant, self.cache_salt)


class TokenLogprobs(NamedTuple):
    """Log-probabilities of the target at one delivered token.

    They are those before temperature, min-p, top-k, top-p and logits processors.

    Attributes:
        logprob: Log-probability of the token, in nats.
        top: The likeliest tokens with theirs, likeliest first.
    """

    logprob: float
    top: list[tuple[int, float]]


def token_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
    """Return log-probabilities of ``C`` tokens, by the logits ``[C, V]`` at them, with the ``top`` likeliest of each.

    Example:
        >>> found = token_logprobs(torch.tensor([[0.0, 0.0]]), [1], top=1)
        >>> [round(each.logprob, 4) for each in found], [token for each in found for token, _ in each.top]
        ([-0.6931], [0])
    """
    log_probs = logits.float().log_softmax(-1)
    own = log_probs.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0].tolist()
    values, ids = log_probs.topk(min(top, logits.shape[-1]), dim=-1)
    columns = zip(own, ids.tolist(), values.tolist(), strict=True)
    return [TokenLogprobs(logprob, list(zip(likeliest, high, strict=True))) for logprob, likeliest, high in columns]


@dataclass(slots=True)
class Drafts:
    """Counts of the drafts of one request.

    Attributes:
        histogram: Rounds that accepted 0, 1, 2, ... drafted tokens; rounds without a draft are not counted.
        num_drafted: Drafted tokens.
        num_delivered: Tokens that these rounds delivered, bonus tokens included.

    Example:
        >>> drafts = Drafts()
        >>> drafts.add(accepted=2, drafted=4, delivered=3)
        >>> drafts.histogram, drafts.acceptance_length
        ([0, 0, 1], 3.0)
    """

    histogram: list[int] = field(default_factory=list)
    num_drafted: int = 0
    num_delivered: int = 0

    def add(self, accepted: int, drafted: int, delivered: int) -> None:
        """Count a round with a draft."""
        self.histogram += [0] * (accepted + 1 - len(self.histogram))
        self.histogram[accepted] += 1
        self.num_drafted += drafted
        self.num_delivered += delivered

    @property
    def num_rounds(self) -> int:
        """Rounds with a draft."""
        return sum(self.histogram)

    @property
    def acceptance_length(self) -> float | None:
        """Tokens that a round with a draft delivered on average; None if there was no such round."""
        return self.num_delivered / self.num_rounds if self.num_rounds else None


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that ended.

    Attributes:
        request: The request.
        tokens: Tokens of the completion, the stop token included, ``[C]`` int64.
        terminated: Whether it ended at a stop token or string, and not at its token budget.
        trajectory: Trajectory of the request; None if nothing was recorded.
        drafts: What became of its drafts.
        logprobs: Log-probabilities of each token, if the request asked for them.
        text: The tokens as text, without a stop string, if :class:`aurora_rl.LLM` served the request.
        cached_tokens: Tokens of the prompt that were found in the engine's prefix cache, and not read again.
        error: Why the request was not served; None if it was.

    Example:
        >>> import torch
        >>> Completion(Request(0, torch.tensor([3])), torch.tensor([4, 5]), terminated=True).finish_reason
        'stop'
    """

    request: Request
    tokens: Tensor
    terminated: bool
    trajectory: TensorDict | None = field(default=None, repr=False)
    drafts: Drafts = field(default_factory=Drafts)
    logprobs: list[TokenLogprobs] | None = None
    text: str = ""
    cached_tokens: int = 0
    error: str | None = None

    @property
    def acceptance_length(self) -> float | None:
        """Tokens that a round with a draft delivered on average; None if there was no such round."""
        return self.drafts.acceptance_length

    @property
    def finish_reason(self) -> str:
        """Why it ended: "stop", "length" or "error"."""
        return "error" if self.error is not None else "stop" if self.terminated else "length"

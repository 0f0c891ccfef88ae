"""Sampling parameters of a request, and of a batch of slots."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one prompt wants its completions.

    They are applied in vLLM's order: temperature, min-p, top-k, top-p.

    Attributes:
        temperature: Divides the logits; 0 decodes greedily, whatever min-p, top-k, top-p and seed say.
        top_k: Keep the k likeliest tokens; 0 or -1, which becomes 0, keeps all.
        top_p: Keep the smallest set of likeliest tokens whose mass reaches this; 1.0 keeps all.
        min_p: Exclude tokens whose probability is below this share of the likeliest token's; 0.0 keeps all.
        n: Number of completions, see :meth:`copies`. A :class:`~aurora_rl.envs.Request` is for one.
        seed: Key of the request's noise, ``-2**63 <= seed < 2**63``. Each gives a stream of its own. The same seed,
            prompt and parameters give the same text. None, the default, lets each :class:`~aurora_rl.envs.Request`
            draw a seed of its own.
        max_tokens: Token budget of the completion. None takes what the context leaves; :class:`~aurora_rl.LLM` alone
            knows how much, so that a :class:`~aurora_rl.envs.Request` needs a number.
        stop: Strings that end the completion, at the token that completes one. A single string is one stop string; None
            is no string.
        logprobs: Likeliest tokens whose log-probabilities come with each token's own, at most 20; 0 for its own alone.
            None, the default, computes none.
        ignore_eos: Whether tokens that end a completion are tokens like others: stop strings and the budget end it.

    Raises:
        ValueError: A field is out of its range.

    Example:
        >>> SamplingParams(temperature=0.7, top_p=0.9, seed=5, stop="END").stop
        ('END',)
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = field(default=0.0, kw_only=True)
    n: int = field(default=1, kw_only=True)
    seed: int | None = None
    max_tokens: int | None = 128
    stop: Sequence[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p", "min_p", "top_k", "n", "seed", "max_tokens", "logprobs"):
            value = getattr(self, name)
            kind, noun = (Real, "a number") if name in ("temperature", "top_p", "min_p") else (Integral, "an integer")
            unset = name in ("seed", "max_tokens", "logprobs") and value is None
            if not unset and (isinstance(value, bool) or not isinstance(value, kind)):
                raise ValueError(f"{name} is {reprlib.repr(value)}; give {noun}")
            if not isinstance(value, int | float | None):  # NumPy's, which JSON does not take and whose sums overflow
                object.__setattr__(self, name, int(value) if kind is Integral else float(value))
        if not 0 <= self.temperature <= torch.finfo(torch.float32).max:
            raise ValueError(f"temperature is {self.temperature}; give a finite number >= 0 (0 decodes greedily)")
        if self.top_k == -1:  # how vLLM and SGLang write all tokens
            object.__setattr__(self, "top_k", 0)
        if not 0 <= self.top_k < 2**63:
            raise ValueError(f"top_k is {self.top_k}; give an integer with 0 <= top_k < 2**63 (0 or -1 turns it off)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; give a number with 0 < top_p <= 1 (1.0 turns it off)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; give a number with 0 <= min_p <= 1 (0.0 turns it off)")
        if self.n < 1:
            raise ValueError(f"n is {self.n}; give an integer >= 1")
        if not -(2**63) <= (self.seed or 0) < 2**63:
            raise ValueError(f"seed is {self.seed}; give an integer with -2**63 <= seed < 2**63, or leave it out")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; give an integer >= 1, or None")
        if not 0 <= (self.logprobs or 0) <= 20:
            raise ValueError(f"logprobs is {self.logprobs}; give an integer with 0 <= logprobs <= 20, or None")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {reprlib.repr(self.ignore_eos)}; give true or false")
        if self.stop is None:
            object.__setattr__(self, "stop", ())
        if isinstance(self.stop, bytes) or not isinstance(self.stop, Iterable):
            raise ValueError(f"stop is {reprlib.repr(self.stop)}; give a string or a sequence of strings")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for text in stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop has {reprlib.repr(text)}; give strings that are not empty")
        object.__setattr__(self, "stop", stop)

    def copies(self) -> list[SamplingParams]:
        """Return the parameters of each of the ``n`` completions: their seeds follow each other, if there is one.

        Example:
            >>> [(each.n, each.seed) for each in SamplingParams(temperature=1.0, n=2, seed=5).copies()]
            [(1, 5), (1, 6)]
        """
        return [
            replace(self, n=1, seed=None if self.seed is None else seed_after(self.seed, index))
            for index in range(self.n)
        ]

    @property
    def token_budget(self) -> int:
        """``max_tokens``, which a request has.

        Raises:
            ValueError: It is None.
        """
        if self.max_tokens is None:
            raise ValueError("max_tokens is None; give a number: only LLM works out what the context leaves")
        return self.max_tokens

    @property
    def noise_seed(self) -> int:
        """The seed; 0 if there is none and none is needed, at temperature 0.

        Raises:
            ValueError: A seed is needed, and None was drawn.
        """
        if self.seed is None and self.temperature > 0:
            raise ValueError("seed is None; give a seed, or the sampling of a new Request, which draws one")
        return self.seed or 0


def seed_after(seed: int, steps: int) -> int:
    """Return the seed that comes ``steps`` after another one; the least one comes after the largest.

    >>> seed_after(-1, 3), seed_after(2**63 - 1, 1) == -(2**63)
    (2, True)
    """
    return (seed + steps + 2**63) % 2**64 - 2**63


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """The sampling parameters of a batch of slots: one tensor of shape ``[B]`` for each field.

    Attributes:
        temperature: Temperatures, float32; 0 decodes greedily.
        top_k: Numbers of likeliest tokens to keep, int64; 0 keeps all.
        top_p: Probability masses to keep, float32.
        min_p: Shares of the likeliest token's probability below which tokens are excluded, float32; 0 keeps all.
        seed: Seeds of the noise, int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    seed: Tensor

    @classmethod
    def from_params(
        cls, params: Sequence[SamplingParams | None], device: torch.device | str | None = None
    ) -> SamplingBatch:
        """Stack the parameters of the slots; None, an empty slot, decodes greedily.

        Example:
            >>> SamplingBatch.from_params([SamplingParams(temperature=1.0, seed=3), None]).seed
            tensor([3, 0])
        """
        filled = [each or SamplingParams() for each in params]

        def stack(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(each, name) for each in filled], dtype=dtype, device=device)

        return cls(
            stack("temperature"),
            stack("top_k", torch.int64),
            stack("top_p"),
            stack("min_p"),
            stack("noise_seed", torch.int64),
        )

    def __getitem__(self, rows: Tensor) -> SamplingBatch:
        return SamplingBatch(*(getattr(self, field.name)[rows] for field in fields(self)))

"""Laws of a token in fractions, for references that are exact to the last digit."""

from __future__ import annotations

from fractions import Fraction

import torch

VOCAB = 3
Law = tuple[Fraction, ...]


def scaled(values: list[Fraction]) -> Law:
    total = sum(values)
    return tuple(v / total for v in values) if total else tuple(values)


def laws(generator: torch.Generator, size: int = VOCAB, zeros: bool = True) -> Law:
    """A random law, now and then with tokens that it excludes."""
    weights = torch.randint(0 if zeros else 1, 7, (size,), generator=generator).tolist()
    return scaled([Fraction(w) for w in weights]) if sum(weights) else laws(generator, size, zeros)

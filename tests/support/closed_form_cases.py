"""Settings of closed forms, and of the divergences of the same names: special cases, and those that are refused."""

from __future__ import annotations

import math

from aurora_kernels import CLOSED_FORMS

SETTINGS: dict[str, list[dict[str, float]]] = {
    "jensen_shannon": [{}, {"beta": 0.1}],
    "skewed_kl": [{}, {"skew": 0.0}],
    "hybrid_overlap": [{}, {"decay": 0.0}],
}
"""The default settings of each, and those at which its formula has a special case."""
CASES = [(name, settings) for name in CLOSED_FORMS for settings in SETTINGS.get(name, [{}])]
REFUSED: list[tuple[str, dict[str, float], str]] = [
    ("jensen_shannon", {"beta": 1.0}, r"beta must lie in \(0, 1\), got 1.0"),
    ("jensen_shannon", {"beta": math.nan}, r"beta must lie in \(0, 1\), got nan"),
    ("skewed_kl", {"skew": 1.0}, r"skew must lie in \[0, 1\), got 1.0"),
    ("hybrid_overlap", {"decay": -1.0}, "decay must be finite and not negative, got -1.0"),
    ("hybrid_overlap", {"decay": math.inf}, "decay must be finite and not negative, got inf"),
]

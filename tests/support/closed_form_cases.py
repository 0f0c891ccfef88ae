"""Every closed form with its default settings, and with those at which its formula has a special case."""

from __future__ import annotations

from aurora_kernels import CLOSED_FORMS

SETTINGS: dict[str, list[dict[str, float]]] = {
    "jensen_shannon": [{}, {"beta": 0.1}],
    "skewed_kl": [{}, {"skew": 0.0}],
    "hybrid_overlap": [{}, {"decay": 0.0}],
}
CASES = [(name, settings) for name in CLOSED_FORMS for settings in SETTINGS.get(name, [{}])]

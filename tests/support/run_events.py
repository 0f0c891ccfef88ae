"""What a run has written, and events as `metrics.jsonl` has them, with usual values where a test names none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aurora_rl.telemetry.log import MetricsReader


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    """Events of a kind in a run's log."""
    return [event for event in MetricsReader(run / "metrics.jsonl") if event["event"] == kind]


def summary(run: Path) -> dict[str, Any]:
    """What a run's `summary.json` holds."""
    return json.loads((run / "summary.json").read_text())


def request(domain: str = "", tokens: int = 8, speculative: tuple[int, int] = (6, 3), **fields: Any) -> dict[str, Any]:
    usual = {
        "event": "request", "time": 1.0, "request": 0, "domain": domain, "tokens": tokens,
        "speculative_tokens": speculative[0], "speculative_rounds": speculative[1], "accepted": {"1": 3},
        "coverage": 0.5,
    }  # fmt: skip
    return usual | fields


def requests(count: int, **fields: Any) -> dict[str, Any]:
    """Of SGLang's own clients."""
    usual = {
        "event": "requests", "time": 1.0, "requests": count, "tokens": 8 * count, "speculative_tokens": 6 * count,
        "speculative_rounds": 3 * count, "accepted": {"1": 3 * count},
    }  # fmt: skip
    return usual | fields


def status(requests: int, **fields: Any) -> dict[str, Any]:
    usual = {
        "event": "status", "time": 100.0 + requests, "requests": requests, "version": 0, "acceptance_length": 2.0,
        "tokens_per_second": {"baseline": 10.0, "speculative": 15.0}, "speedup": 1.5, "baseline_rounds": 96,
        "break_even": 1.25, "drafted": {"tree": 3, "baseline": 1}, "learner": "running",
    }  # fmt: skip
    return usual | fields


def swap(requests: int, version: int = 1) -> dict[str, Any]:
    return {"event": "swap", "time": 100.0 + requests, "requests": requests, "version": version, "ms": 2.5}


def gate(**fields: Any) -> dict[str, Any]:
    usual = {
        "event": "gate", "time": 100.0, "publish": True, "difference": 0.0711, "interval": [0.01, 0.13],
        "candidate": 2.1, "serving": 2.03, "requests": 16, "reason": None, "version": 1, "seconds": 1.0, "seen": 32,
        "steps": 40,
    }  # fmt: skip
    return usual | fields


def train(**fields: Any) -> dict[str, Any]:
    return {"event": "train", "time": 100.0, "loss": 1.2345, "steps": 40, "seen": 32, "waiting": 2} | fields


def verdict(**fields: Any) -> dict[str, Any]:
    usual = {
        "event": "verdict", "time": 100.0, "version": 1, "against": 0, "requests": 40, "promote": False,
        "reason": "acceptance length fell", "rounds": 176, "pairs": 11, "acceptance_length": {"old": 2.0, "new": 2.5},
        "tokens_per_second": {"old": 30.0, "new": 35.0},
        "evidence": {"acceptance_length": 250.0, "tokens_per_second": 3.0},
    }  # fmt: skip
    return usual | fields


def watchdog(**fields: Any) -> dict[str, Any]:
    usual = {
        "event": "watchdog", "time": 100.0, "version": 1, "cause": "corrupted",
        "detail": "tensor 'fc.weight' is all zero", "action": "its weights were loaded again", "requests": 40,
    }  # fmt: skip
    return usual | fields

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import pytest

from aurora_rl.cli.config import Config, load_config


def keys(config: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(config):
        value = getattr(config, field.name)
        found += keys(value, f"{prefix}{field.name}.") if is_dataclass(value) else [prefix + field.name]
    return found


def test_the_keys_are_frozen() -> None:
    """A key is a promise to users: add one here on purpose, and describe it in the documentation."""
    assert keys(Config()) == [
        *("model", "device", "dtype"),
        *("engine.name", "engine.slots", "engine.max_length", "engine.prefix_cache_tokens", "engine.threads"),
        *("engine.url", "engine.plugin_address", "engine.arguments", "engine.capture_rate", "engine.part_tokens"),
        "engine.batch_invariant",
        *("http.host", "http.port", "http.api_keys", "http.served_model_name"),
        *("http.max_body", "http.max_waiting", "http.timeout"),
        "http.cors_origins",
        *("traffic.path", "traffic.limit", "traffic.shuffle", "traffic.requests"),
        *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "rule", "generation_config", "seed"),
        *("drafter.name", "drafter.options", "drafter.path", "drafter.trained_for"),
        *("drafter.vocab_size", "drafter.vocab_follows", "drafter.feature_layers"),
        *(
            "drafter.depth",
            "drafter.width",
            "drafter.num_nodes",
            "drafter.lookup",
            "drafter.history",
            "drafter.mode",
            "drafter.adaptive",
            "drafter.adapters",
            "drafter.adapter_rank",
        ),
        *("baseline.share", "baseline.window"),
        *("wire.trajectories", "wire.weights", "wire.queue", "wire.queue_bytes", "wire.max_message", "wire.keys"),
        "objectives",
        *(
            "learner.spawn",
            "learner.threads",
            "learner.nice",
            "learner.batch_size",
            "learner.replay",
            "learner.buffer",
            "learner.buffer_bytes",
        ),
        *("learner.muon_lr", "learner.adam_lr", "learner.publish_every", "learner.max_skipped"),
        *("learner.keep", "learner.parallel", "learner.resume", "learner.recording"),
        *("checkpoint.keep", "checkpoint.buffer"),
        *("gate.requests", "gate.margin"),
        *("canary.share", "canary.window", "canary.false_alarm_rate", "canary.margin", "canary.max_rounds"),
        *("canary.engines", "canary.requests", "canary.max_requests"),
        "compare",
        *("privacy.opt_out", "privacy.max_age", "privacy.zero_retention"),
        "telemetry.logger",
        "telemetry.max_log",
        *("fleet.address", "fleet.engines", "fleet.learner", "fleet.max_restarts", "fleet.timeout"),
        "run_dir",
    ]


def test_the_engine_gets_the_threads_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aurora_rl.cli.config.schema.usable_cpus", lambda: 3)
    assert load_config().engine.threads == 2

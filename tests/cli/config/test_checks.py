"""Values that are out of range, or do not go together, are one line that names the key and the value."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aurora_rl.cli.config import load_config
from aurora_rl.cli.errors import ConfigError


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("http.port=65536", "http.port must lie in 0..65535 or be null, got 65536"),
        ("http.host=", "http.host must not be empty, got ''"),
        ("http.max_waiting=0", "http.max_waiting must be at least 1, got 0"),
        ("engine.threads=1025", r"engine.threads must lie in 1\.\.1024, got 1025"),
        ("learner.threads=100000", r"learner.threads must lie in 1\.\.1024, got 100000"),
        ("learner.threads=0", r"learner.threads must lie in 1\.\.1024, got 0"),
        ("http.timeout=0", "http.timeout must be a number of seconds above 0, got 0"),
        ("http.timeout=.inf", "http.timeout must be a number of seconds above 0, got inf"),
        ("http.cors_origins=[chat.example/]", r"http.cors_origins must be like https://.*, got \['chat.example/'\]"),
        ("telemetry.logger=comet", "telemetry.logger must be csv, tensorboard, wandb, mlflow or null, got 'comet'"),
        (
            "engine.plugin_address=there",
            "engine.plugin_address must be tcp://host:port, ipc://path or null, got 'there'",
        ),
        ("engine.prefix_cache_tokens=-1", "engine.prefix_cache_tokens must not be negative, got -1"),
    ],
)
def test_a_value_out_of_range_is_named(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        load_config(overrides=[pair])


def test_what_is_at_its_limit_is_taken() -> None:
    config = load_config(
        overrides=["http.port=0", "http.cors_origins=['*','http://a:1']", "engine.prefix_cache_tokens=0"]
    )
    assert (config.http.port, config.http.cors_origins, config.engine.prefix_cache_tokens) == (
        0,
        ("*", "http://a:1"),
        0,
    )
    assert load_config(overrides=["http.port=null"]).http.port is None


@pytest.mark.parametrize(
    "pair",
    ["wire.trajectories=tcp://0.0.0.0:5557", "wire.weights=tcp://learner:5558", "engine.plugin_address=tcp://*:5560"],
)
def test_an_address_that_other_hosts_can_reach_needs_keys(pair: str, tmp_path: Path) -> None:
    key, address = pair.split("=")
    more = [] if key.startswith("wire") else ["engine.url=http://h:1", "engine.name=sglang", "drafter.path=d"]
    with pytest.raises(ConfigError, match=rf"^{key}={re.escape(address)}: other hosts can reach it, .* `aurora-rl"):
        load_config(overrides=[pair, *more])
    assert load_config(overrides=[pair, *more, f"wire.keys={tmp_path}"]).wire.keys == str(tmp_path)


def test_vllm_drafts_chains_and_its_clients_ask_it_themselves() -> None:
    config = load_config(overrides=["engine.name=vllm"])
    assert (config.drafter.width, config.http.port, config.canary.share) == (1, None, 0)
    for pair, message in (
        ("drafter.width=2", "engine.name=vllm drafts chains, got drafter.width=2; set drafter.width=1"),
        ("http.port=8000", "http.port=8000: there is no front before vLLM"),
        ("canary.share=0.5", "canary.share=0.5: vLLM keeps one drafter"),
        ("rule=greedy", "engine.name=vllm verifies by a rule of its own"),
        ("drafter.mode=sampled", "engine.name=vllm drafts likeliest tokens"),
        ("privacy.zero_retention=true", "got engine.name=vllm, whose prefix cache"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(overrides=["engine.name=vllm", pair])

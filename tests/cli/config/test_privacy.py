"""Settings of privacy, and what they demand of others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aurora_rl.cli.config import load_config, to_yaml
from aurora_rl.cli.config.privacy import check_records
from aurora_rl.cli.errors import ConfigError

ZERO = "privacy.zero_retention=true"


def kept(*pairs: str) -> tuple[int, int, int]:
    config = load_config(overrides=pairs)
    return config.engine.prefix_cache_tokens, config.drafter.history, config.learner.replay


def test_zero_retention_takes_the_place_of_defaults_alone() -> None:
    assert kept() == (8192, 65536, 10) and kept(ZERO) == (0, 0, 0) == kept(ZERO, "drafter.history=0")


@pytest.mark.parametrize("key", ["engine.prefix_cache_tokens", "drafter.history", "learner.replay"])
def test_what_keeps_texts_is_refused_with_zero_retention(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^privacy.zero_retention=true keeps nothing, got {key}=5; set {key}=0$"):
        load_config(overrides=[f"{key}=5", ZERO])


@pytest.mark.parametrize("pair", ["learner.recording=stream", "checkpoint.buffer=true", "engine.name=sglang"])
def test_what_writes_or_cannot_be_reached_is_refused_by_name(pair: str) -> None:
    with pytest.raises(ConfigError, match=f"^privacy.zero_retention=true .*, got {pair}"):
        load_config(overrides=[ZERO, pair])


def test_a_saved_configuration_is_read_back(tmp_path: Path) -> None:
    config = load_config(overrides=[ZERO, "privacy.opt_out=[a, b-7]", "privacy.max_age=60"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config
    assert (config.privacy.opt_out, config.privacy.max_age) == (("a", "b-7"), 60.0)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        ("privacy.opt_out=[a, b@c]", "privacy.opt_out: the tenant is 'b@c'; give 1 to 128"),
        ("privacy.max_age=0", "privacy.max_age=0.0 must be a number of seconds above 0, or null"),
        ("privacy.max_age=.nan", "privacy.max_age=nan must be"),
    ],
)
def test_a_value_out_of_range_is_named(pair: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        load_config(overrides=[pair])


@pytest.mark.parametrize("engine", ["sglang", "vllm"])
def test_tenants_opt_out_only_where_a_front_knows_them(engine: str) -> None:
    pairs = [f"engine.name={engine}", "drafter.name=eagle3", "privacy.opt_out=[a]"]
    with pytest.raises(ConfigError, match=r"^privacy.opt_out=\['a'\] needs requests to come through our front"):
        load_config(overrides=[*pairs, "http.port=null"])


def test_a_command_that_records_is_refused_with_zero_retention() -> None:
    check_records(load_config())
    with pytest.raises(ConfigError, match="^privacy.zero_retention=true writes no text to disk, and this command"):
        check_records(load_config(overrides=[ZERO]))

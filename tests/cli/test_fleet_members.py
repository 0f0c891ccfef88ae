"""Members of a fleet: what differs from the fleet's configuration, their files and their keys."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

from aurora_rl.cli.config import FleetConfig, load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.fleet_members import Member, Wire, members_of
from aurora_rl.collectors.keys import engine_keys, learner_keys

WIRE = Wire("tcp://10.0.0.5:5557", "tcp://10.0.0.5:5558")
FLEET = "{chat: {replicas: 2, num_cpus: 4}, code: {overrides: [engine.slots=7, engine.threads=3, http.port=9000]}}"


def members(tmp_path: Path, *pairs: str) -> dict[str, Member]:
    pairs = (f"fleet.engines={FLEET}", *pairs)
    return {each.name: each for each in members_of(load_config(overrides=pairs), None, pairs, tmp_path)}


def test_members_are_the_fleet_s_configuration_and_their_own_overrides(tmp_path: Path) -> None:
    found = members(tmp_path, "seed=3", "fleet.learner={num_cpus: 2.0, overrides: [learner.batch_size=8]}")
    assert list(found) == ["learner", "chat-0", "chat-1", "code-0"]
    configs = [each.config for each in found.values()]
    assert all(config.seed == 3 and config.fleet == FleetConfig() and config.run_dir is None for config in configs)
    learner, *engines = configs
    assert learner.learner.batch_size == 8 and learner.learner.threads == 2
    assert not any(config.learner.spawn for config in engines)
    # Threads follow num_cpus, unless an engine's own pairs say otherwise.
    assert [(config.engine.slots, config.engine.threads) for config in engines] == [(2, 4), (2, 4), (7, 3)]


def test_a_member_goes_on_with_its_run_and_has_the_newest_addresses(tmp_path: Path) -> None:
    found = members(tmp_path)
    engine, learner = found["chat-0"], found["learner"]
    engine.folder.mkdir()
    yaml = tmp_path / "members" / "chat-0.yaml"
    assert engine.words(WIRE, 8001) == ["serve", "--config", str(yaml), f"run_dir={engine.run}"]
    assert "port: 8001" in yaml.read_text()
    engine.run.mkdir()
    (engine.run / "config.yaml").touch()
    assert engine.words(WIRE) == ["serve", "--resume", str(engine.run), "--config", str(yaml)]
    assert WIRE.weights in yaml.read_text() and "port: null" in yaml.read_text()
    assert learner.words(WIRE)[0] == "learn"


def test_hosts_have_keys_that_are_made_and_each_engine_has_its_own_alone(tmp_path: Path) -> None:
    config = load_config()
    wire = Wire.at("10.0.0.5", config, tmp_path)
    assert (wire.trajectories, wire.weights, wire.keys) == (WIRE.trajectories, WIRE.weights, tmp_path / "keys")
    assert Wire.at("127.0.0.1", config, tmp_path).keys is None
    assert Wire.at("fd00::5", config, tmp_path).weights == "tcp://[fd00::5]:5558"
    for _ in range(2):  # a learner that is started again finds the same
        wire.make_keys(["chat-0", "chat-1"])
    folder = wire.keys_of("chat-1")
    assert folder is not None and engine_keys(folder).name == "chat-1"
    learner = learner_keys(wire.keys_of("learner") or "")
    assert [learner.name_of(engine_keys(wire.keys_of(name) or "").public) for name in ("chat-0", "chat-1")] == [
        *("chat-0", "chat-1")
    ]
    secrets = list((tmp_path / "keys").rglob("*.key_secret"))
    assert len(secrets) == 5 and all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in secrets)
    members(tmp_path)["chat-0"].folder.mkdir()
    members(tmp_path)["chat-0"].words(wire)
    assert load_config(tmp_path / "members" / "chat-0.yaml").wire.keys == str(tmp_path / "keys" / "of" / "chat-0")


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        ("fleet.engines={}", "fleet.engines is empty; name a group"),
        ("fleet.engines.chat.overrides=[engine.slot=4]", "fleet.engines.chat.overrides: unknown key 'engine.slot'"),
        (
            "fleet.learner.overrides=[learner.nice=20]",
            "fleet.learner.overrides: learner.nice must lie in 0..19, got 20",
        ),
        ("learner.parallel=ddp", "a fleet's learner is one process"),
    ],
)
def test_what_is_refused(tmp_path: Path, pair: str, wrong: str) -> None:
    pairs = ([] if pair == "fleet.engines={}" else [f"fleet.engines={FLEET}"]) + [pair]
    with pytest.raises(ConfigError) as error:
        members_of(load_config(overrides=pairs), None, pairs, tmp_path)
    assert wrong in str(error.value)


def test_hosts_do_not_meet_at_a_path() -> None:
    with pytest.raises(ConfigError, match="hosts of a fleet reach each other by tcp://host:port"):
        Wire.at("10.0.0.5", load_config(overrides=["wire.weights=ipc:///tmp/weights"]), Path())

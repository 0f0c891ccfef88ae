"""The section `fleet` of a configuration."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_rl.cli.config import load_config
from aurora_rl.cli.config.fleet import EngineGroup, Placement, engine_groups, learner_placement
from aurora_rl.cli.errors import ConfigError

FILE = """
fleet:
  engines:
    chat: {replicas: 2, num_cpus: 0.5, overrides: [engine.slots=4]}
    code: {num_gpus: 2, resources: {rack-a: 1}}
  learner: {num_cpus: 3}
"""


def test_groups_are_read_from_a_file_and_pairs_change_one(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text(FILE)
    config = load_config(tmp_path / "fleet.yaml", ["fleet.engines.chat.replicas=3"])
    assert engine_groups(config) == {
        "chat": EngineGroup(num_cpus=0.5, replicas=3, overrides=["engine.slots=4"]),
        "code": EngineGroup(num_gpus=2, resources={"rack-a": 1}),
    }
    assert learner_placement(config) == Placement(num_cpus=3)
    assert engine_groups(config)["code"].demand == {"CPU": 1.0, "GPU": 2, "rack-a": 1}


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        ("fleet.engines.chat.replica=2", "fleet.engines.chat has no setting 'replica'; did you mean 'replicas'?"),
        ("fleet.learner.replicas=2", "fleet.learner has no setting 'replicas'"),
        ("fleet.engine.chat=3", "unknown key 'fleet.engine.chat' in fleet.engine.chat=3; did you mean 'fleet.engines'"),
        ("fleet.engines.chat.replicas=0", "fleet.engines.chat.replicas must be at least 1, got 0"),
        ("fleet.engines.chat.replicas=two", "fleet.engines.chat: replicas must be an integer, got 'two'"),
        ("fleet.engines.chat=2", "fleet.engines.chat must be a mapping, such as {num_cpus: 4}, got 2"),
        ("fleet.engines.a/b={}", "fleet.engines: a name has letters, digits, - and _, got 'a/b'"),
        ("fleet.learner.num_cpus=-1", "fleet.learner.num_cpus must be a number that is not negative, got -1"),
        ("fleet.learner.num_gpus=1.5", "fleet.learner.num_gpus must be whole above 1, got 1.5"),
        ("fleet.learner.resources={rack: a}", "fleet.learner.resources.rack must be a number that is not negative"),
        ("fleet.learner.resources={GPU: 1}", "fleet.learner.resources has GPU; set fleet.learner.num_gpus"),
        ("fleet.learner.overrides=[1]", "must be a list of key=value, such as [engine.slots=4], got 1"),
        ("fleet.max_restarts=-1", "fleet.max_restarts must not be negative, or be null, got -1"),
        ("fleet.timeout=0", "fleet.timeout must be a number of seconds above 0, got 0.0"),
        ("fleet.address=ray://head:10001", "fleet.address must be auto, host:port or null, got 'ray://head:10001'"),
    ],
)
def test_what_is_refused(pair: str, wrong: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(overrides=[pair])
    assert wrong in str(error.value)

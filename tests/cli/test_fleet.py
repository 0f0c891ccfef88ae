"""`aurora-rl fleet`: what is refused before a member starts, and what a member's end comes to."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from aurora_rl.cli import main as cli
from aurora_rl.cli.config import load_config
from aurora_rl.cli.fleet import _Fleet
from aurora_rl.cli.fleet_cluster import Cluster
from aurora_rl.cli.fleet_members import members_of

pytestmark = pytest.mark.usefixtures("signal_handlers")


@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        ("fleet.max_restarts=2", "fleet.engines is empty; name a group, such as fleet.engines.chat.replicas=2"),
        ("fleet.engines.chat.overrides=[engine.slot=4]", "fleet.engines.chat.overrides: unknown key 'engine.slot'"),
        ("fleet.engines.chat.num_gpus=64", "chat-0 asks for CPU 1, GPU 64, and no node has that: "),
    ],
)
def test_what_is_refused_leaves_no_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], pair: str, wrong: str
) -> None:
    assert cli.main(["fleet", pair, f"run_dir={tmp_path / 'run'}"]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aurora-rl: ")]
    assert line.startswith(f"aurora-rl: {wrong}")
    assert not (tmp_path / "run").exists()


def test_a_fleet_goes_on_by_its_own_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").touch()
    assert cli.main(["fleet", "--resume", str(tmp_path)]) == 2
    assert "name the fleet's file too, by --config FILE" in capsys.readouterr().err


def test_a_member_that_refuses_its_configuration_ends_the_fleet(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    pairs = [
        "telemetry.logger=mlflow",
        "fleet.engines.chat.num_cpus=0.5",
        "fleet.learner.num_cpus=0.5",
        f"run_dir={run}",
    ]
    assert cli.main(["fleet", *pairs]) == 2
    told = capsys.readouterr().err  # by whichever member failed first
    assert re.search(r"(learner|chat-0) did not start: telemetry\.logger=mlflow needs the package mlflow", told)
    assert (run / "members" / "learner.log").is_file()


def test_engines_on_one_node_have_ports_of_their_own_which_they_keep(tmp_path: Path) -> None:
    pairs = ["fleet.engines={chat: {replicas: 3}, quiet: {overrides: [http.port=0]}}", "http.host=0.0.0.0"]
    config = load_config(overrides=pairs)
    fleet = _Fleet(config, members_of(config, None, pairs, tmp_path), Cluster.__new__(Cluster), tmp_path)
    for engine, node in zip(fleet._engines, ("10.0.0.5", "10.0.0.5", "fd00::6", "10.0.0.5"), strict=True):
        engine.port = fleet._free_port(engine.member.config.http.port, node)
        engine.node = node
    urls = ["http://10.0.0.5:8000", "http://10.0.0.5:8001", "http://[fd00::6]:8000", None]
    assert [engine.url for engine in fleet._engines] == urls
    fleet._write_targets()
    targets = json.loads((tmp_path / "prometheus.json").read_text())
    assert targets[2] == {"targets": ["[fd00::6]:8000"], "labels": {"engine": "chat-2"}} and len(targets) == 3

"""A Ray cluster of this machine: what it lacks, and processes on it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import wait

from aurora_rl.cli.config import load_config
from aurora_rl.cli.config.fleet import Placement
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.fleet import _Fleet
from aurora_rl.cli.fleet_cluster import Cluster, LostError, Seat
from aurora_rl.cli.fleet_members import members_of
from aurora_rl.cli.signals import Stop


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:  # ended since
        return 0


def actors() -> list[int]:
    """Processes of the actors of this process's cluster: Ray's node is its child, and has them."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    found = [pid for pid in pids if parent(parent(pid)) == os.getpid()]
    return [pid for pid in found if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::_Process")]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    before = signal.getsignal(signal.SIGTERM)
    with Cluster(None) as cluster:
        assert signal.getsignal(signal.SIGTERM) is before
        yield cluster


@pytest.fixture
def seat(cluster: Cluster) -> Iterator[Seat]:
    seat = Seat(Placement(num_cpus=0.5))
    wait(seat.placed)
    yield seat
    seat.leave()


def test_what_a_cluster_lacks_is_named(cluster: Cluster) -> None:
    assert cluster.local and cluster.lacks(Placement(num_cpus=1)) == ""
    told = cluster.lacks(Placement(num_cpus=1, num_gpus=64, resources={"rack-a": 1}))
    assert told.startswith("CPU 1, GPU 64, rack-a 1, and no node has that: ") and "CPU" in told.partition(": ")[2]
    assert cluster.lacks_in_all([Placement(num_cpus=0.5)] * 2) == ""
    assert cluster.lacks_in_all([Placement(num_cpus=1)] * 999).startswith("CPU 999, and all nodes have CPU ")


def test_a_process_runs_to_its_end_and_its_output_is_in_the_log(seat: Seat, tmp_path: Path) -> None:
    assert seat.ended() is None  # not begun
    for words, status, text in ((["--version"], 0, "aurora-rl "), (["learn", "seed=x"], 2, "aurora-rl: seed is 'x'")):
        seat.start(words, tmp_path / "log")
        assert seat.ended(60) == status
        assert text in (tmp_path / "log").read_text()


def test_a_node_that_does_not_see_the_folder_is_named(seat: Seat) -> None:
    seat.start(["--version"], Path("/not/shared/log"))
    with pytest.raises(ConfigError, match=r"node [\d.]+: /not/shared is not there; set run_dir to a folder on a file"):
        seat.ended(60)


def test_an_actor_that_dies_is_lost(seat: Seat, tmp_path: Path) -> None:
    (actor,) = actors()
    seat.start(["learn", "--parent", "1"], tmp_path / "log")
    os.kill(actor, signal.SIGKILL)
    with pytest.raises(LostError, match="actor"):
        wait(lambda: seat.ended(1) is not None)


def test_a_process_ends_in_order_even_if_it_has_only_begun(seat: Seat, tmp_path: Path) -> None:
    seat.start(["learn", "--parent", "1"], tmp_path / "log")
    seat.stop()
    assert seat.ended(60) in (130, -signal.SIGTERM)


@pytest.mark.usefixtures("signal_handlers")
def test_a_fleet_does_not_wait_for_ever(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "local", False)  # nodes may join
    pairs = ["fleet.engines={chat: {num_cpus: 0.5}}", "fleet.learner={num_gpus: 64}", "fleet.timeout=0.5"]
    config = load_config(overrides=pairs)
    fleet = _Fleet(config, members_of(config, None, pairs, tmp_path), cluster, tmp_path)
    with pytest.raises(ConfigError) as error:
        fleet.serve(Stop())
    assert str(error.value).startswith(
        "learner has waited for fleet.timeout=0.5 s for a place: it asks for CPU 1, GPU 64, and no node has that: "
    )
    assert fleet.end() == []


def test_ray_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"aurora-rl fleet needs ray: pip install 'aurora-rl\[ray\]'"):
        Cluster(None)

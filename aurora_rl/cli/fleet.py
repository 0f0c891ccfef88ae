"""``aurora-rl fleet``: engines and their learner on a Ray cluster, started again when they die."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aurora_rl.cli.arguments import add_config_arguments, add_resume_argument
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.fleet_cluster import Cluster, LostError, Seat
from aurora_rl.cli.fleet_members import Member, Wire, members_of
from aurora_rl.cli.output import plain_console
from aurora_rl.cli.restarts import LONGEST_WAIT_S, last_line, restart_wait
from aurora_rl.cli.run_dir import RunDir
from aurora_rl.cli.signals import Stop
from aurora_rl.storage import write_file
from aurora_rl.telemetry.log import MetricsLog, MetricsReader
from aurora_rl.telemetry.view import every

_LOOK_S = 0.2
_TOLD_S = 10.0  # after so long a member that waits for resources is told
_WORKS = ("learner_ready", "request", "status", "swap")  # events of a member that has started
_ORDERLY = (0, 130, -signal.SIGTERM)  # the last two had not begun to work
_END_S = 100.0  # seconds for a member's end; fleet_cluster says when it is killed


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_resume_argument(parser, "the learner and drafter that its members saved last")
    add_config_arguments(parser, "fleet.engines.chat.replicas=2")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Run the fleet until a signal comes. Returns the exit status."""
    resume = arguments.resume is not None
    if resume and arguments.config is None:
        raise ConfigError(f"--resume {arguments.resume}: name the fleet's file too, by --config FILE")
    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(
            contextlib.closing(RunDir(config, ["config.yaml"], suffix="-fleet", resume=resume))
        )
        arguments.run_dir = folder.path
        with folder.undone_if_refused():
            members = members_of(config, arguments.config, arguments.overrides, folder.path)
            with stop.held():
                cluster = opened.enter_context(Cluster(config.fleet.address))
            _refuse_lacking(cluster, members)
        stop.working = True
        fleet = _Fleet(config, members, cluster, folder.path)
        failures = []
        try:
            fleet.serve(stop)
        except GivenUpError as error:
            failures.append(str(error))
        finally:
            stop.ignore()
            failures += fleet.end()
    for failure in failures:
        print(f"aurora-rl: {failure}", file=sys.stderr)
    return 1 if failures else 0


class GivenUpError(Exception):
    """A member has died too often."""


def _refuse_lacking(cluster: Cluster, members: list[Member]) -> None:
    """Raise ConfigError if members ask for what our own cluster lacks. Nodes may join another one."""
    if not cluster.local:
        return
    for member in members:
        if lacking := cluster.lacks(member.placement):
            raise ConfigError(f"{member.name} asks for {lacking}; ask for less, or join a cluster by fleet.address")
    if lacking := cluster.lacks_in_all([member.placement for member in members]):
        raise ConfigError(f"the fleet asks for {lacking}; ask for less, or join a cluster by fleet.address")


@dataclass(slots=True)
class _Post:
    """A member as it fares: its seat on the cluster, and when it is to be started."""

    member: Member
    events: MetricsReader
    seat: Seat | None = None  # None before Ray was asked for one, and after its node has gone
    runs: bool = False  # its process was started and has not ended
    ready: bool = False  # that process has begun to work
    recalled: bool = False  # it was asked to end, to be started with other addresses
    restarts: int = 0  # after it had died
    failures: int = 0  # restarts in a row that lived for less than a minute
    due: float = 0.0  # when it is to be started
    since: float = field(default_factory=time.monotonic)  # when it was started, or when it began to wait
    told: bool = False  # the user knows that it waits for a place
    node: str | None = None  # address of the node that it was started on last
    port: int | None = None  # at which an engine listens there; None if it has none, 0 for any
    status: dict[str, Any] = field(default_factory=dict)  # the last that an engine logged

    @property
    def url(self) -> str | None:
        """Where clients reach an engine that was started; None if no port is known."""
        if not self.port:
            return None
        host = self.member.config.http.host
        host = self.node or "" if host in ("0.0.0.0", "::") else host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"


class _Fleet:
    """The members of a fleet on a cluster."""

    def __init__(self, config: Config, members: list[Member], cluster: Cluster, folder: Path) -> None:
        self._config, self._cluster, self._folder, self._console = config, cluster, folder, plain_console()
        self._log = MetricsLog(folder / "metrics.jsonl", "fleet", config.telemetry.max_log)
        members[0].folder.mkdir(exist_ok=True)
        self._posts = [_Post(each, MetricsReader(each.run / "metrics.jsonl", from_now=True)) for each in members]
        self._learner, *self._engines = self._posts
        self._host: str | None = None  # the learner's
        self._wire: Wire | None = None

    def serve(self, stop: Stop) -> None:
        """Start the members, and those that die again, until the user asks for an end."""
        self._say(f"a learner and {len(self._engines)} engine(s) · run folder {self._folder}")
        tell = every(15.0, lambda: self._say(self._line()))
        while not stop.requested:
            for post in self._posts:
                self._look(post)
                if not post.runs and time.monotonic() >= post.due and self._seated(post):
                    self._start(post)
            tell()
            time.sleep(_LOOK_S)

    def _seated(self, post: _Post) -> bool:
        """Return whether a member has a place, and knows where the learner is."""
        if post.seat is None:
            post.seat, post.since, post.told = Seat(post.member.placement), time.monotonic(), False
        try:
            if post.seat.placed():
                if post is self._learner and post.seat.host != self._host:
                    self._move(post.seat.host)
                return self._wire is not None
        except LostError:
            post.seat = None
            return False
        waited, name = time.monotonic() - post.since, post.member.name
        lacking = self._cluster.lacks(post.member.placement) or "resources that others hold"
        if post.node is None and waited > self._config.fleet.timeout:
            raise ConfigError(
                f"{name} has waited for fleet.timeout={self._config.fleet.timeout:g} s for a place: it asks for "
                f"{lacking}"
            )
        if waited > _TOLD_S and not post.told:
            post.told = True
            self._say(f"{name} waits for a place: it asks for {lacking}")
        return False

    def _move(self, host: str | None) -> None:
        """Note on which node the learner is, and have engines that run go there."""
        moved, self._host = self._host is not None, host
        config = self._config
        if self._cluster.local or host is None:
            keys = Path(config.wire.keys) if config.wire.keys else None
            self._wire = Wire(config.wire.trajectories, config.wire.weights, keys)
        else:
            self._wire = Wire.at(host, config, self._folder)
        self._wire.make_keys(engine.member.name for engine in self._engines)
        if moved:
            self._say(f"the learner is on node {host} now; engines are started again with its addresses")
        for engine in self._engines:
            if engine.runs and engine.seat is not None:
                engine.recalled = True
                engine.seat.stop()

    def _start(self, post: _Post) -> None:
        assert post.seat is not None and post.seat.host is not None and self._wire is not None
        member = post.member
        if post is not self._learner and post.seat.host != post.node:
            post.port = self._free_port(member.config.http.port, post.seat.host)
        post.node = post.seat.host
        post.seat.start(member.words(self._wire, post.port), member.log)
        post.runs, post.ready, post.recalled, post.since = True, False, False, time.monotonic()
        self._log.write("member_started", member=member.name, node=post.node, url=post.url, restarts=post.restarts)
        again = f" again ({post.restarts})" if post.restarts else ""
        self._say(f"{member.name} is started{again} on node {post.node}")
        self._write_targets()

    def _free_port(self, first: int | None, node: str) -> int | None:
        """Return the first port from ``first`` on that no other engine on a node has."""
        if not first:
            return first
        taken = {engine.port for engine in self._engines if engine.node == node}
        return next(port for port in itertools.count(first) if port not in taken)

    def _look(self, post: _Post) -> None:
        """See what a member logged, and whether it has ended."""
        for event in post.events:
            if event["event"] == "status":
                post.status = event
            if event["event"] in _WORKS and post.runs and not post.ready:
                post.ready = True
                self._say(f"{post.member.name} " + (f"answers at {post.url}" if post.url else "works"))
        if not post.runs or post.seat is None:
            return
        member, seat = post.member, post.seat
        try:
            status = seat.ended()
            if status is None:
                return
            reason = _how_it_ended(member, status)
        except LostError as error:
            status, reason, post.seat = -1, f"was lost with its node or its actor: {error}", None
        post.runs, post.ready, lived = False, False, time.monotonic() - post.since
        if post.recalled:
            return
        self._log.write("member_ended", member=member.name, reason=reason)
        if status == 2 and not post.restarts:
            raise ConfigError(f"{member.name} did not start: {last_line(member.log)}")
        most = self._config.fleet.max_restarts
        if most is not None and post.restarts >= most:
            raise GivenUpError(f"{member.name} {reason}; it was started again fleet.max_restarts={most} times")
        post.restarts += 1
        post.failures = 0 if lived > LONGEST_WAIT_S else post.failures + 1
        wait = restart_wait(max(post.failures - 1, 0))
        post.due = time.monotonic() + wait
        self._say(f"{member.name} {reason}; it is started again in {wait:g} s, see {member.log}")

    def _write_targets(self) -> None:
        """Write where metrics are, for Prometheus's ``file_sd_configs``."""
        targets = [
            {"targets": [engine.url.removeprefix("http://")], "labels": {"engine": engine.member.name}}
            for engine in self._engines
            if engine.url
        ]
        write_file(self._folder / "prometheus.json", json.dumps(targets, indent=2) + "\n")

    def _line(self) -> str:
        """Return how the fleet fares, in a line."""
        statuses = [engine.status for engine in self._engines if engine.status]
        lengths = [status["acceptance_length"] for status in statuses if status.get("acceptance_length")]
        parts = [
            f"learner {'works' if self._learner.ready else 'is away'}",
            f"{sum(engine.ready for engine in self._engines)}/{len(self._engines)} engines work",
            f"{sum(status.get('requests', 0) for status in statuses)} requests",
            f"version {max((status.get('version') or 0 for status in statuses), default=0)}",
        ]
        if lengths:
            parts.append(f"acceptance length {sum(lengths) / len(lengths):.2f}")
        if restarts := sum(post.restarts for post in self._posts):
            parts.append(f"{restarts} restarts")
        return " · ".join(parts)

    def end(self) -> list[str]:
        """End all members in good order, engines first. Return what went wrong."""
        failures = []
        for posts in (self._engines, [self._learner]):  # engines first: the learner gets their last trajectories
            running = [(post.member, post.seat) for post in posts if post.runs and post.seat is not None]
            for _, seat in running:
                seat.stop()
            for member, seat in running:
                try:
                    status = seat.ended(_END_S)
                    reason = _how_it_ended(member, status)
                except (LostError, ConfigError) as error:
                    status, reason = -1, f"was lost: {error}"
                if status not in _ORDERLY:
                    failures.append(f"{member.name} {reason}; see {member.log}")
                self._log.write("member_ended", member=member.name, reason=reason)
        self._say(self._line().partition(" · ")[2] + f" · written to {self._folder}")
        return failures

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def _how_it_ended(member: Member, status: int | None) -> str:
    if status is None:
        return f"did not end within {_END_S:.0f} s"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}: {last_line(member.log)}"

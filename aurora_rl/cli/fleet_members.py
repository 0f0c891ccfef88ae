"""The members of a fleet: names, configurations, files and command lines of its engines and its learner."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from aurora_rl.addresses import is_local
from aurora_rl.cli.config import Config, FleetConfig, load_config, to_yaml
from aurora_rl.cli.config.fleet import Placement, engine_groups, learner_placement
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.ranks import refuse_parallel
from aurora_rl.cli.run_dir import make_absolute

LEARNER = "learner"


@dataclass(frozen=True, slots=True)
class Wire:
    """Addresses at which the learner of a fleet listens, and the folder of its keys and the engines', or None."""

    trajectories: str
    weights: str
    keys: Path | None = None

    @classmethod
    def at(cls, host: str, config: Config, folder: Path) -> Wire:
        """Return the wire of a learner at the address ``host`` of its node, with the ports of the configuration.

        Other hosts need keys: those of ``wire.keys``, else of ``keys`` in the fleet's folder.

        Raises:
            ConfigError: An address of the configuration has no port.
        """

        def at(key: str, address: str) -> str:
            if not address.startswith("tcp://"):
                raise ConfigError(f"wire.{key}={address}: hosts of a fleet reach each other by tcp://host:port")
            return f"tcp://{f'[{host}]' if ':' in host else host}:{address.rpartition(':')[2]}"

        wire = config.wire
        trajectories, weights = at("trajectories", wire.trajectories), at("weights", wire.weights)
        keys = Path(wire.keys) if wire.keys else None if is_local(trajectories) else folder / "keys"
        return cls(trajectories, weights, keys)

    def keys_of(self, member: str) -> Path | None:
        """Return the folder of a member's keys: an engine has one with its own alone."""
        return self.keys if self.keys is None or member == LEARNER else self.keys / "of" / member

    def make_keys(self, engines: Iterable[str]) -> None:
        """Make the keys that are missing. An engine's folder has links to those files that it needs."""
        if self.keys is None:
            return
        from aurora_rl.collectors.keys import make_keys

        for engine in engines:
            with naming("wire.keys"):
                make_keys(self.keys, engine)
            folder = self.keys / "of" / engine
            (folder / "engines").mkdir(mode=0o700, parents=True, exist_ok=True)
            for name in ("learner.key", f"engines/{engine}.key", f"engines/{engine}.key_secret"):
                with suppress(FileExistsError):
                    (folder / name).symlink_to(self.keys.absolute() / name)


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a fleet.

    Attributes:
        name: Name of the member: ``learner``, or that of its group and a number, such as ``chat-0``.
        placement: What it gets of a node.
        config: Configuration of its command, but for the wire and the port of an engine.
        folder: Folder of the fleet's members. This one's run is in ``<name>`` there, its configuration in
            ``<name>.yaml``, and its output in ``<name>.log``.
    """

    name: str
    placement: Placement
    config: Config
    folder: Path

    @property
    def run(self) -> Path:
        """Folder of its run."""
        return self.folder / self.name

    @property
    def log(self) -> Path:
        """File of its output."""
        return self.folder / f"{self.name}.log"

    def words(self, wire: Wire, port: int | None = None) -> list[str]:
        """Write its configuration, and return its command line after ``aurora-rl``. It goes on with an earlier run."""
        keys = wire.keys_of(self.name)
        folder = None if keys is None else str(keys)
        ends = replace(self.config.wire, trajectories=wire.trajectories, weights=wire.weights, keys=folder)
        config = replace(self.config, http=replace(self.config.http, port=port), wire=ends)
        path = self.folder / f"{self.name}.yaml"
        path.write_text(to_yaml(config, run_dir=False), encoding="utf-8")
        command, document = ("learn", "learner.yaml") if self.name == LEARNER else ("serve", "config.yaml")
        where = ["--resume", str(self.run)] if (self.run / document).is_file() else []
        return [command, *where, "--config", str(path), *([] if where else [f"run_dir={self.run}"])]


def members_of(config: Config, path: str | None, overrides: Sequence[str], folder: Path) -> list[Member]:
    """Return the members of a fleet, the learner first.

    Its configuration was read from ``path`` with ``overrides``; a member's own pairs come after these.

    Raises:
        ConfigError: There is no engine, or a member's own configuration cannot be used.
    """
    groups = engine_groups(config)
    if not groups:
        raise ConfigError("fleet.engines is empty; name a group, such as fleet.engines.chat.replicas=2")
    refuse_parallel(config, "a fleet's learner")
    folder = folder / "members"

    def own(section: str, placement: Placement, *pairs: str) -> Config:
        threads = f"{section}.threads={max(int(placement.num_cpus), 1)}"
        pairs = (*overrides, "run_dir=null", threads, *placement.overrides, *pairs)
        return replace(make_absolute(load_config(path, pairs)), fleet=FleetConfig())

    with naming("fleet.learner.overrides"):
        placement = learner_placement(config)
        found = [Member(LEARNER, placement, own("learner", placement), folder)]
    for group, placement in groups.items():
        with naming(f"fleet.engines.{group}.overrides"):
            shared = own("engine", placement, "learner.spawn=false")
        found += [Member(f"{group}-{number}", placement, shared, folder) for number in range(placement.replicas)]
    return found

"""A Ray cluster, and the actors on it that run the members of a fleet. The only file that knows Ray."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aurora_rl.cli.config.fleet import Placement
from aurora_rl.cli.errors import ConfigError

_END_S = 90.0  # an engine drains, a learner completes its step, and both write their reports
_LOOK_S = 0.2  # between two looks at a process
_OBJECT_STORE = 80 << 20  # bytes, about the least that Ray takes: members exchange nothing by it


class Cluster:
    """A Ray cluster, as a context manager.

    Args:
        address: Cluster to join, such as ``auto``; None starts one on this host, and ends it.

    Attributes:
        local: Whether the cluster is our own, so that no node can join it.

    Raises:
        ConfigError: Ray is not installed, or no cluster answers at the address.
    """

    def __init__(self, address: str | None) -> None:
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported and when it starts its processes
        try:
            import ray
        except ImportError as error:
            raise ConfigError(f"aurora-rl fleet needs ray: pip install 'aurora-rl[ray]' ({error})") from error
        self._ray, self.local = ray, address is None
        self._folder = contextlib.ExitStack()
        options: dict[str, Any] = {"address": address}
        if self.local:
            folder = self._folder.enter_context(tempfile.TemporaryDirectory(prefix="aurora-rl-ray-"))
            options = {"address": "local", "_temp_dir": folder, "object_store_memory": _OBJECT_STORE}
            options |= {"include_dashboard": False}
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
        except (ConnectionError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise ConfigError(
                f"fleet.address={address}: no Ray cluster lets us in: {error}; start one by `ray start --head`, set "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN if it asks for a token, or leave the key out for one of our own"
            ) from error
        finally:
            for number, handler in handlers.items():  # Ray takes SIGTERM for itself
                signal.signal(number, handler)

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *error: object) -> None:
        self._ray.shutdown()
        self._folder.close()

    def lacks(self, placement: Placement) -> str:
        """Return the demand that no node could meet though it were idle, and what nodes have; empty if one could."""
        nodes = [node for node in self._ray.nodes() if node["Alive"]]
        if any(all(node["Resources"].get(name, 0) >= n for name, n in placement.demand.items()) for node in nodes):
            return ""
        have = "; ".join(f"{node['NodeManagerAddress']} has {_amounts(node['Resources'])}" for node in nodes)
        return f"{_amounts(placement.demand)}, and no node has that: {have}"

    def lacks_in_all(self, placements: list[Placement]) -> str:
        """Return what members ask for together beyond what all nodes have; empty if there is enough."""
        total = self._ray.cluster_resources()
        asked: dict[str, float] = {}
        for placement in placements:
            for name, amount in placement.demand.items():
                asked[name] = asked.get(name, 0) + amount
        short = {name: amount for name, amount in asked.items() if amount > total.get(name, 0)}
        return f"{_amounts(short)}, and all nodes have {_amounts({n: total.get(n, 0) for n in short})}" if short else ""


class Seat:
    """The place of one member on a cluster: an actor, whose process it is.

    Attributes:
        host: Address of its node; None until it is placed.
    """

    def __init__(self, placement: Placement) -> None:
        import ray

        self._ray: Any = ray
        self.host: str | None = None
        options = {"num_cpus": placement.num_cpus, "num_gpus": placement.num_gpus}
        actor: Any = ray.remote(_Process)
        self._actor = actor.options(
            **options, resources=dict(placement.resources), max_concurrency=2, max_restarts=0
        ).remote()
        self._node: Any = self._actor.node.remote()
        self._life: Any = None

    def placed(self) -> bool:
        """Return whether a node has it by now.

        Raises:
            LostError: The node has gone.
        """
        if self.host is None and self._ray.wait([self._node], timeout=0)[0]:
            with self._lost():
                node = self._ray.get(self._node)
            self.host = next(each["NodeManagerAddress"] for each in self._ray.nodes() if each["NodeID"] == node)
        return self.host is not None

    def start(self, words: list[str], log: Path) -> None:
        """Start ``aurora-rl`` with these words. Its output is appended to ``log``."""
        self._life = self._actor.run.remote(words, str(log), os.getcwd())

    def ended(self, seconds: float = 0.0) -> int | None:
        """Wait for the end of the process, and return its exit status; None if it runs.

        Raises:
            LostError: The actor or its node has gone.
            ConfigError: The node does not see the folder of the fleet, or it cannot start the process.
        """
        if self._life is None or not self._ray.wait([self._life], timeout=seconds)[0]:
            return None
        life, self._life = self._life, None
        with self._lost():
            return int(self._ray.get(life))

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        try:
            yield
        except self._ray.exceptions.RayActorError as error:
            self.leave()
            raise LostError(str(error).splitlines()[0].rstrip(".")) from error
        except self._ray.exceptions.RayTaskError as error:
            raise ConfigError(f"node {self.host}: {error.cause}") from error

    def stop(self) -> None:
        """Ask the process to end in good order. It is killed if it does not within a minute and a half."""
        self._actor.stop.remote()

    def leave(self) -> None:
        """Give the place back."""
        self._ray.kill(self._actor)


class LostError(Exception):
    """An actor has ended, or its node has gone."""


class _Process:
    """The actor: one process of ``aurora-rl`` on the node that Ray has put it on."""

    def __init__(self) -> None:
        self._to_end = False

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, words: list[str], log: str, directory: str) -> int:
        """Run ``aurora-rl`` to its end, and return its exit status."""
        import ray

        if not os.path.isdir(os.path.dirname(log)):
            raise FileNotFoundError(
                f"{os.path.dirname(log)} is not there; set run_dir to a folder on a file system that all nodes share"
            )
        environment = dict(os.environ)
        if not ray.get_gpu_ids():  # Ray hides GPUs of others from those that reserve some
            environment["CUDA_VISIBLE_DEVICES"] = ""
        # A session of its own: Ray kills the process group of an actor that dies, and the member is to end in order.
        with open(log, "ab") as output:
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "aurora_rl.cli.main", *words, "--end-with", str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                cwd=directory if os.path.isdir(directory) else None,
                env=environment,
            )
        ray_node, cut_off, deadline = os.getppid(), False, math.inf
        while child.poll() is None:
            time.sleep(_LOOK_S)
            cut_off = os.getppid() != ray_node  # Ray's process on the node has ended
            if (self._to_end or cut_off) and deadline == math.inf:
                child.send_signal(signal.SIGTERM)
                deadline = time.monotonic() + _END_S
            if time.monotonic() > deadline:
                child.kill()
        if cut_off:  # Ray waits for this method, and the member is to be started elsewhere
            os._exit(1)
        self._to_end = False
        return child.returncode

    def stop(self) -> None:
        self._to_end = True


def _amounts(resources: dict[str, float]) -> str:
    usual = {name: n for name, n in resources.items() if not name.startswith(("node:", "memory", "object_store"))}
    return ", ".join(f"{name} {amount:g}" for name, amount in sorted(usual.items())) or "nothing"

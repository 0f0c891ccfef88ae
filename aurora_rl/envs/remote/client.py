"""A server of another process from outside: asked by HTTP for completions, by its plugin for the rest."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx
import torch
from torch import Tensor

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import plugin_client_keys
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.remote.replicas import ask_all
from aurora_rl.policies.registry import recognized
from aurora_rl.remote_engines import address_variable, keys_variable
from aurora_rl.storage import CheckpointError

_START_S = 300.0
_TAIL = 2_000
_PROBE = 2**62 - 1


class EngineError(RuntimeError):
    """A server that does not start, answer or do what was asked; the message says what and why."""


@dataclass(frozen=True, slots=True)
class EngineCompletion:
    """A request that an engine has answered.

    Attributes:
        request: Request as it was sent.
        tokens: Tokens of the completion, a stop token included, ``[n]`` int64.
        terminated: Whether the text ended by itself, not by its budget.
        rounds: Number of verification passes, each of which delivered a token and its accepted drafts.
        accepted: Number of rounds by the number of drafts that they accepted.
        versions: Versions of the drafter's weights that were served meanwhile, oldest first; empty if the engine does
            not say.
        drafted: Number of drafted tokens.
    """

    request: Request
    tokens: Tensor
    terminated: bool
    rounds: int
    accepted: dict[int, int]
    versions: list[int]
    drafted: int


class EngineClient:
    """A client of a running server. A client of an engine adds how it is asked (:meth:`generate`) and started.

    Args:
        url: URL of the server, such as ``http://127.0.0.1:30000``.
        plugin_address: Address of the plugin; None if nothing is recorded or swapped.
        keys: Folder of the engine's keys, as ``aurora-rl keys`` makes it; None if the plugin and the learner have none.
        process: The server, if it was launched here; ended by :meth:`close`.
        log: File to which the process prints.
    """

    engine: ClassVar[str]
    """Name of the engine, for messages."""
    error: ClassVar[type[EngineError]]
    """Error that is raised if the server fails or refuses."""
    watched: ClassVar[tuple[str, ...]] = ("prefill", "verify")
    """Entries of "seen" in the plugin's status that one request must raise."""
    _folder: str | None = None  # folder of the plugin's address, if the server was launched here

    def __init__(
        self,
        url: str,
        plugin_address: str | None = None,
        *,
        keys: str | os.PathLike[str] | None = None,
        process: subprocess.Popen | None = None,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        """Prepare to ask; nothing is asked yet."""
        self.url, self.plugin_address = url.rstrip("/"), plugin_address
        self._process, self._log = process, None if log is None else Path(log)
        self._keys = None if keys is None else plugin_client_keys(keys)
        # A connection a request: a server ends idle ones whenever it likes, also while the next request is on its way.
        # And not through a proxy that the environment names.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.Client(limits=limits, trust_env=False)

    @classmethod
    def start(
        cls,
        command: Sequence[str],
        url: str,
        *,
        plugin: bool,
        environment: Mapping[str, str],
        log: str | os.PathLike[str] | None,
        keys: str | os.PathLike[str] | None,
    ) -> Self:
        """Start a server by its command, and wait until it and the plugin answer.

        Args:
            command: Program and arguments.
            url: URL at which it will answer.
            plugin: Whether it is started with our plugin, and is to draft.
            environment: Environment variables, next to those of this process.
            log: File for what it prints; None takes a temporary one.
            keys: Folder of the engine's keys; None if it has none.

        Raises:
            EngineError: It ends or does not answer within five minutes; the message has the end of its log.
        """
        path = cls.log_file(log)
        variables, address, folder = dict(environment), None, None
        if plugin:
            # A path, not a port: until the server binds it, half a minute from now, another process may take a port.
            folder = tempfile.mkdtemp(prefix="aurora-rl-")
            address = variables[address_variable(cls.engine)] = f"ipc://{folder}/plugin"
            if keys is not None:
                variables[keys_variable(cls.engine)] = os.path.abspath(keys)
        with open(path, "ab") as output:
            process = subprocess.Popen(
                command,
                # SAFEPATH: a stray http.py where the user stands must not take the standard library's place.
                env={**os.environ, "PYTHONSAFEPATH": "1", **variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        engine = cls(url, address, keys=keys, process=process, log=path)
        engine._folder = folder
        try:
            engine.wait_ready(_START_S)
            if plugin:
                engine.status()
        except PluginError as error:
            engine.close()
            raise cls.error(f"{error}: {engine._tail()}") from error
        except BaseException:
            engine.close()
            raise
        return engine

    @classmethod
    def log_file(cls, log: str | os.PathLike[str] | None) -> Path:
        """Return the file for what a server prints: ``log``, or a temporary one if that is None."""
        if log is not None:
            return Path(log)
        descriptor, name = tempfile.mkstemp(suffix=".log", prefix=f"{cls.engine.lower()}-")
        os.close(descriptor)
        return Path(name)

    def wait_ready(self, timeout: float) -> None:
        """Wait until the server answers, or raise EngineError if it does not in time or its process ends."""
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if self._process is not None and self._process.poll() is not None:
                raise self.error(f"{self.engine} ended with status {self._process.returncode}: {self._tail()}")
            if time.monotonic() > deadline:
                raise self.error(f"{self.engine} at {self.url} does not answer after {timeout:.0f} s: {self._tail()}")
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            return self._http.get(f"{self.url}/health", timeout=5).status_code == 200
        except (httpx.HTTPError, httpx.InvalidURL):
            return False

    def _tail(self) -> str:
        return self._log.read_text(errors="replace")[-_TAIL:] if self._log is not None else "see its log"

    # ---- requests -------------------------------------------------------------------------------------------------

    def generate(
        self, request: Request, *, stop_tokens: Sequence[int] = (), timeout: float = 600.0
    ) -> EngineCompletion:
        """Ask for one completion and wait for it; may be called from several threads.

        Args:
            request: Prompt, budget and sampling. It stays out of the records where its ``learn`` is false.
            stop_tokens: Token ids that end the text, in addition to those of the model's own configuration.
            timeout: Seconds to wait.

        Raises:
            EngineError: The server refuses, or does not answer.
        """
        raise NotImplementedError

    def _check_request(self, request: Request) -> None:
        params, reason = request.sampling_params, ""
        if not request.speculative:
            reason = f"speculative=false is not supported by {self.engine}; leave it out"
        elif params.logprobs is not None:
            reason = f"logprobs are not asked of {self.engine} by this client; leave them out"
        elif params.min_p and params.temperature:
            where = f"{self.engine}, which does not apply it when it verifies drafts"
            reason = f"min_p={params.min_p:g} is not supported by {where}; leave it out"
        if reason:
            raise self.error(f"request {request.id}: {reason}")

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        """Post to any of the server's endpoints and return the decoded JSON.

        Raises:
            EngineError: The server refuses, or does not answer within ``timeout`` seconds.
        """
        return self._request("POST", path, timeout, json=body)

    def get(self, path: str, timeout: float) -> Any:
        """Get from any of the server's endpoints and return the decoded JSON; errors as of :meth:`post`."""
        return self._request("GET", path, timeout)

    def _request(self, method: str, path: str, timeout: float, **content: Any) -> Any:
        try:
            reply = self._http.request(method, self.url + path, timeout=timeout, **content)
            if reply.is_success:
                return reply.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise self.error(
                f"{self.engine} at {self.url} does not answer {path}: {str(error) or repr(error)}"
            ) from error
        raise self.error(f"{self.engine} refuses {path}: {reply.text[:500]}")

    # ---- recording and swaps --------------------------------------------------------------------------------------

    def attach(
        self,
        *,
        handshake: Handshake,
        trajectories: str,
        weights: str,
        version: int = 0,
        capture_rate: float = 1.0,
        queue: int = 256,
        queue_bytes: int = 1 << 29,
        max_age: float | None = None,
        max_message: int = 1 << 30,
        top_k: int = 64,
        max_bytes: int = 1 << 30,
        store_bytes: int = 1 << 28,
        part_tokens: int | None = 256,
    ) -> dict[str, Any]:
        """Record from now on and take weights, after one request has shown that the hooks are in force.

        Args:
            handshake: What the learner expects; compared with the engine's model, drafter and feature layers.
            trajectories: Address of the learner's collector.
            weights: Address of its publisher.
            version: Version of the weights that the server has now.
            capture_rate: Share of the requests to capture.
            queue: Trajectories that wait for an absent learner before the oldest is dropped.
            queue_bytes: Most bytes of them.
            max_age: Seconds that a trajectory may wait; None knows no limit.
            max_message: Most bytes of a trajectory, and of weights, on the wire.
            top_k: Likeliest tokens to keep of the target's distribution, where the input of its head cannot be reached
                (SGLang under CUDA graphs).
            max_bytes: Host memory of requests on their way; further ones are served without a record.
            store_bytes: Host memory of features of earlier texts, for prompts with a cached prefix.
            part_tokens: Tokens of an answer after which what is written of it is sent, while it goes on, see
                :mod:`aurora_rl.trajectory_parts`; None sends requests when they have ended.

        Returns:
            The plugin's status.

        Raises:
            PluginError: The plugin refuses, or its hooks did not see the request.
        """
        self.probe(self.status())
        fields = {"trajectories": trajectories, "weights": weights, "version": version, "capture_rate": capture_rate}
        fields["keys"] = self._keys is not None
        limits = {"queue": queue, "queue_bytes": queue_bytes, "max_age": max_age or 0, "max_message": max_message}
        limits |= {"top_k": top_k, "max_bytes": max_bytes, "store_bytes": store_bytes, "part_tokens": part_tokens or 0}
        return self._ask("attach", {"handshake": handshake.to_meta(), **fields, **limits})

    def probe(self, status: dict[str, Any]) -> None:
        """Send a request that nobody learns from; PluginError if the hooks saw nothing of it since ``status``."""
        before = status["seen"]
        self.generate(Request(_PROBE, torch.arange(1, 5), SamplingParams(max_tokens=4), learn=False))
        seen = self.status()["seen"]
        silent = [hook for hook in self.watched if seen.get(hook, 0) <= before.get(hook, 0)]
        if silent:
            raise PluginError(
                f"a request passed and the hooks {silent} saw nothing of it: {self.engine} drafts or verifies in "
                "another way than they know"
            )

    def detach(self) -> dict[str, Any]:
        """Stop recording and taking weights; the server goes on with those that it has."""
        return self._ask("detach")

    def set_recording(self, on: bool) -> dict[str, Any]:
        """Switch recording on or off while a learner is attached; return the plugin's status."""
        return self._ask("record", {"on": on})

    def delete(self, tenant: str) -> dict[str, Any]:
        """Drop what the plugin keeps of a tenant's requests that have begun, and tell the learner to do so.

        Returns:
            "trajectories" that waited in its queue, and whether the "learner" was "told" or is "absent".
        """
        return self._ask("delete", {"tenant": tenant})["deleted"]

    def status(self) -> dict[str, Any]:
        """Return the plugin's status: versions, hooks, counts of records and of requests not recorded, swaps."""
        return self._ask("status")

    def _ask(self, kind: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        if self.plugin_address is None:
            raise PluginError("this engine has no plugin address; set engine.plugin_address to the plugin's")
        return ask_all(self.plugin_address, kind, fields, engine=self.engine, keys=self._keys)

    def close(self) -> None:
        """End the server, if it was launched here. Idempotent."""
        if self._process is None:
            return
        process, self._process = self._process, None
        # Its whole session, schedulers included, and at once: asked politely, it drains and sleeps for ten seconds.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(self, *_: object) -> None:
        """End as :meth:`close` does."""
        self.close()


def learned_method(
    folder: str | os.PathLike[str], config: Mapping[str, Any], attribute: str, learned: Sequence[str], *, engine: str
) -> str:
    """Return an engine's name for the method of the drafter that a folder's configuration is of.

    Args:
        folder: The folder, for messages.
        config: Entries of its ``config.json``.
        attribute: Class attribute of drafters with that name, such as ``"vllm_method"``.
        learned: Names of the methods that learn with the engine.
        engine: Name of the engine, for messages.

    Raises:
        CheckpointError: No drafter is of this configuration, or its method does not learn with the engine.
    """
    try:
        kind = recognized(config)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    method: str | None = getattr(kind, attribute)
    if method is None or method not in learned:
        raise CheckpointError(
            f"{folder}: config.json is of {kind.__name__}, which does not learn with {engine}; take a drafter of "
            f"{' or '.join(learned)}, such as drafter.name=eagle3"
        )
    return method


def free_ports(count: int) -> list[int]:
    """Return ports of this host that nobody listens at now."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]

"""An SGLang server from outside: launched or attached to, asked by HTTP for completions, by its plugin for the rest."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from torch import Tensor

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import plugin_client_keys
from aurora_rl.envs import Request, SamplingParams
from aurora_rl.envs.recording.plugin_server import PluginError, ask
from aurora_rl.envs.sglang import ENVIRONMENT, KEYS_ENVIRONMENT, LEARNED
from aurora_rl.policies.formats.vllm import LAYER_IDS
from aurora_rl.policies.registry import recognized
from aurora_rl.storage import CheckpointError, read_folder

_START_S = 300.0
_TAIL = 2_000
# The attention backend that knows trees; named for all uses at once, it is replaced on a CPU without AMX. Idle, a
# scheduler would spin and keep a core from the learner.
CPU_ARGUMENTS = [
    *(f"--{use}-backend=intel_amx" for use in ("prefill-attention", "decode-attention", "speculative-draft-attention")),
    *("--disable-cuda-graph", "--grammar-backend=none", "--sleep-on-idle"),
]
"""What SGLang's server needs on a CPU, next to ``--device cpu``."""
CPU_VARIABLES = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
"""And its environment."""


class SGLangError(RuntimeError):
    """A server that does not start, answer or do what was asked; the message says what and why."""


@dataclass(frozen=True, slots=True)
class SGLangCompletion:
    """A request that SGLang has answered.

    Attributes:
        request: Request as it was sent.
        tokens: Tokens of the completion, a stop token included, ``[n]`` int64.
        terminated: Whether the text ended by itself, not by its budget.
        rounds: Number of verification passes, each of which delivered a token and its accepted drafts.
        accepted: Number of rounds by the number of drafts that they accepted.
        versions: Versions of the drafter's weights that were served meanwhile, oldest first.
        drafted: Number of drafted tokens.
    """

    request: Request
    tokens: Tensor
    terminated: bool
    rounds: int
    accepted: dict[int, int]
    versions: list[int]
    drafted: int


class SGLangClient:
    """A client of a running server.

    Args:
        url: URL of the server, such as ``http://127.0.0.1:30000``.
        plugin_address: Address of the plugin; None if nothing is recorded or swapped.
        keys: Folder of the engine's keys, as ``aurora-rl keys`` makes it; None if the plugin and the learner have none.
        process: The server, if it was launched here; ended by :meth:`close`.
        log: File to which the process prints.
    """

    def __init__(
        self,
        url: str,
        plugin_address: str | None = None,
        *,
        keys: str | os.PathLike[str] | None = None,
        process: subprocess.Popen | None = None,
        log: str | os.PathLike[str] | None = None,
    ) -> None:
        self.url, self.plugin_address = url.rstrip("/"), plugin_address
        self._process, self._log = process, None if log is None else Path(log)
        self._argmax = False
        self._keys = None if keys is None else plugin_client_keys(keys)
        # A connection a request: a server ends idle ones whenever it likes, also while the next request is on its way.
        # And not through a proxy that the environment names.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._http = httpx.Client(limits=limits, trust_env=False)

    @classmethod
    def launch(
        cls,
        model: str | os.PathLike[str],
        *,
        drafter: str | os.PathLike[str] | None = None,
        depth: int = 3,
        width: int = 1,
        num_nodes: int = 4,
        slots: int = 4,
        max_length: int = 1024,
        dtype: str = "auto",
        device: str = "cpu",
        log: str | os.PathLike[str] | None = None,
        keys: str | os.PathLike[str] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> SGLangClient:
        """Start a server and wait until it answers.

        Args:
            model: Folder or hub id of the target.
            drafter: Folder of an EAGLE-3 or EAGLE drafter; None decodes plainly.
            depth: Drafting steps of a round.
            width: 1 drafts a chain; more, a tree that expands so many nodes a step.
            num_nodes: Nodes of a tree without its root.
            slots: Requests decoded at the same time.
            max_length: Tokens of a request, prompt and completion; some less than the model's context.
            dtype: Dtype of the weights, "auto" for the checkpoint's.
            device: "cpu" or "cuda".
            log: File for what the server prints; None takes a temporary one. If an EAGLE drafter has a reduced draft
                vocabulary, it is written next to this file.
            keys: Folder of the engine's keys; see the class.
            arguments: More arguments of ``sglang.launch_server``.
            environment: More environment variables.

        Raises:
            SGLangError: It ends or does not answer within five minutes; the message has the end of its log.
            CheckpointError: The drafter's folder is not one.
        """
        path = Path(log or tempfile.mkstemp(suffix=".log", prefix="sglang-")[1])
        # SAFEPATH: a stray http.py where the user stands must not take the standard library's place.
        variables = {**os.environ, "PYTHONSAFEPATH": "1", **(environment or {})}
        (port, plugin_port), plugin = free_ports(2), None
        context, drafting = max_length + _OWN_PLACES, list[str]()
        if drafter is not None:
            context = max_length + reserved_context(depth, width, num_nodes)
            drafting = [
                *drafter_arguments(drafter, path.with_suffix(".token_map.pt")),
                *("--speculative-num-steps", str(depth), "--speculative-eagle-topk", str(width)),
                *("--speculative-num-draft-tokens", str(num_nodes + 1)),
            ]
            plugin = variables[ENVIRONMENT] = f"tcp://127.0.0.1:{plugin_port}"
            if keys is not None:
                variables[KEYS_ENVIRONMENT] = os.path.abspath(keys)
        command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--dtype", dtype),
            *("--host", "127.0.0.1", "--port", str(port), "--device", device),
            *("--max-running-requests", str(slots), "--context-length", str(context)),
            *("--skip-server-warmup", "--log-level", "warning", *drafting),
        ]
        if device == "cpu":
            # Left to itself, the cache takes most of the machine's free memory.
            command += [*CPU_ARGUMENTS, "--max-total-tokens", str(2 * slots * context)]
            variables |= CPU_VARIABLES
        with open(path, "ab") as output:
            process = subprocess.Popen(
                [*command, *arguments],
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        engine = cls(f"http://127.0.0.1:{port}", plugin, keys=keys, process=process, log=path)
        try:
            engine.wait_ready(_START_S)
        except BaseException:
            engine.close()
            raise
        return engine

    def wait_ready(self, timeout: float) -> None:
        """Wait until the server answers, or raise SGLangError if it does not in time or its process ends."""
        deadline = time.monotonic() + timeout
        while not self._healthy():
            if self._process is not None and self._process.poll() is not None:
                raise SGLangError(f"SGLang ended with status {self._process.returncode}: {self._tail()}")
            if time.monotonic() > deadline:
                raise SGLangError(f"SGLang at {self.url} does not answer after {timeout:.0f} s: {self._tail()}")
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
    ) -> SGLangCompletion:
        """Ask for one completion and wait for it; may be called from several threads.

        Args:
            request: Prompt, budget and sampling. It stays out of the records where its ``learn`` is false.
            stop_tokens: Token ids that end the text, in addition to those of the model's own configuration.
            timeout: Seconds to wait.

        Raises:
            SGLangError: The server refuses, or does not answer.
        """
        sampling = request.sampling_params
        if not request.speculative:
            raise SGLangError(f"request {request.id}: speculative=false is not supported by SGLang; leave it out")
        if sampling.logprobs is not None:
            raise SGLangError(f"request {request.id}: logprobs are not asked of SGLang by this client; leave them out")
        if self._argmax and sampling.temperature > 0:
            raise SGLangError(
                f"request {request.id}: temperature {sampling.temperature:g} is not supported, since SGLang verifies "
                "greedily on a CPU; set temperature=0"
            )
        params: dict[str, Any] = {
            "max_new_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "stop": list(sampling.stop) or None,
            "stop_token_ids": list(stop_tokens) or None,
            "ignore_eos": sampling.ignore_eos,  # stop_token_ids too, in SGLang
        }
        if sampling.top_k:
            params["top_k"] = sampling.top_k
        if sampling.temperature > 0:
            params["sampling_seed"] = sampling.seed
        if not request.learn:
            params["custom_params"] = {"aurora_rl": False}
        reply = self.post(
            "/generate",
            {
                "input_ids": request.prompt.tolist(),
                "sampling_params": params,
                "rid": str(request.id),
                "cache_salt": request.salt,
            },
            timeout,
        )
        meta = reply["meta_info"]
        histogram = meta.get("spec_correct_drafts_histogram") or []
        return SGLangCompletion(
            request,
            torch.tensor(reply["output_ids"], dtype=torch.int64),
            (meta.get("finish_reason") or {}).get("type") == "stop",
            int(meta.get("spec_verify_ct") or 0),
            {count: rounds for count, rounds in enumerate(histogram) if rounds},
            [int(span["version"]) for span in meta.get("weight_versions") or [] if str(span["version"]).isdecimal()],
            int(meta.get("spec_num_proposed_drafts") or 0),
        )

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        """Post to any of the server's endpoints and return the decoded JSON.

        Raises:
            SGLangError: The server refuses, or does not answer within ``timeout`` seconds.
        """
        try:
            reply = self._http.post(self.url + path, json=body, timeout=timeout)
            if reply.is_success:
                return reply.json()
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise SGLangError(f"SGLang at {self.url} does not answer {path}: {str(error) or repr(error)}") from error
        raise SGLangError(f"SGLang refuses {path}: {reply.text[:500]}")

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
    ) -> dict[str, Any]:
        """Record from now on and take weights, after one request has shown that the hooks are in force.

        Args:
            handshake: What the learner expects; compared with the engine's model, drafter and captured layers.
            trajectories: Address of the learner's collector.
            weights: Address of its publisher.
            version: Version of the weights that the server has now.
            capture_rate: Share of the requests to record.
            queue: Trajectories that wait for an absent learner before the oldest is dropped.
            queue_bytes: Most bytes of them.
            max_age: Seconds that a trajectory may wait; None knows no limit.
            max_message: Most bytes of a trajectory, and of weights, on the wire.
            top_k: Likeliest tokens to keep of the target's distribution, where the input of its head cannot be reached
                (CUDA graphs).
            max_bytes: Host memory of requests on their way; further ones are served without a record.
            store_bytes: Host memory of features of earlier texts, for prompts with a cached prefix.

        Returns:
            The plugin's status.

        Raises:
            PluginError: The plugin refuses, or its hooks did not see the request.
        """
        status = self.status()
        before, self._argmax = status["seen"], status["device"] == "cpu"
        self.generate(Request(_PROBE, torch.arange(1, 5), SamplingParams(max_tokens=4), learn=False))
        seen = self.status()["seen"]
        silent = [hook for hook in ("prefill", "verify") if seen.get(hook, 0) <= before.get(hook, 0)]
        if silent:
            raise PluginError(
                f"a request passed and the hooks {silent} saw nothing of it: SGLang drafts or verifies in another way"
                " than they know"
            )
        fields = {"trajectories": trajectories, "weights": weights, "version": version, "capture_rate": capture_rate}
        fields["keys"] = self._keys is not None
        limits = {"queue": queue, "queue_bytes": queue_bytes, "max_age": max_age or 0, "max_message": max_message}
        limits |= {"top_k": top_k, "max_bytes": max_bytes, "store_bytes": store_bytes}
        return self._ask("attach", {"handshake": handshake.to_meta(), **fields, **limits})

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
        return ask(self.plugin_address, kind, fields, engine="SGLang", keys=self._keys)

    def close(self) -> None:
        """End the server, if it was launched here. Idempotent."""
        if self._process is None:
            return
        process, self._process = self._process, None
        # Its whole session, schedulers included, and at once: asked politely, it drains and sleeps for ten seconds.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def __enter__(self) -> SGLangClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def drafter_arguments(drafter: str | os.PathLike[str], token_map: str | os.PathLike[str]) -> list[str]:
    """Return SGLang's arguments for a drafter's folder in the format "sglang".

    A reduced draft vocabulary is written to ``token_map``; EAGLE-3's stays in the folder.

    Raises:
        CheckpointError: The folder is not a checkpoint of a drafter that learns with SGLang.
    """
    tensors, config = read_folder(drafter, "config.json")
    try:
        kind = recognized(config)
    except ValueError as error:
        raise CheckpointError(f"{drafter}: {error}") from error
    if (algorithm := kind.sglang_algorithm) not in LEARNED:
        raise CheckpointError(
            f"{drafter}: config.json is of {kind.__name__}, which does not learn with SGLang; take a drafter of "
            f"{' or '.join(LEARNED)}, such as drafter.name=eagle3"
        )
    if min((config.get("eagle_config") or {}).get(LAYER_IDS) or [0]) < 0:
        raise CheckpointError(
            f"{drafter}: the drafter reads what enters layer 0, which SGLang cannot capture; start a drafter of layers "
            "from 1 on (drafter.feature_layers)"
        )
    arguments = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(drafter)]
    if algorithm != "EAGLE3" and "d2t" in tensors:
        torch.save((tensors["d2t"] + torch.arange(len(tensors["d2t"]))).tolist(), token_map)
        arguments += ["--speculative-token-map", str(token_map)]
    return arguments


_PROBE = 2**62 - 1
_OWN_PLACES = 6


def reserved_context(depth: int, width: int, num_nodes: int) -> int:
    """Return how many places of a request's context SGLang keeps for its drafts and for itself.

    >>> reserved_context(3, 4, 6)
    18
    """
    return max(width * depth, num_nodes + 1) + _OWN_PLACES


def free_ports(count: int) -> list[int]:
    """Return ports of this host that nobody listens at now."""
    with contextlib.ExitStack() as opened:
        sockets = [opened.enter_context(socket.socket()) for _ in range(count)]
        for bound in sockets:
            bound.bind(("127.0.0.1", 0))
        return [bound.getsockname()[1] for bound in sockets]

"""A vLLM server from outside: launched or attached to, asked by HTTP for completions, by its plugin for the rest."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from aurora_rl.envs import Request
from aurora_rl.envs.remote.client import EngineClient, EngineCompletion, EngineError, free_ports, learned_method
from aurora_rl.envs.vllm import ENGINE, LEARNED
from aurora_rl.storage import read_folder

CPU_VARIABLES = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise threads are bound to all cores, the learner's too
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; left to itself it takes half of the machine's memory
}
"""Environment of vLLM's server on a CPU; what the caller's environment has of it stays."""
# What makes rounds recordable: the model runner whose functions the hooks know, one batch at a time, raw logits.
_ARGUMENTS = ("--no-async-scheduling", "--generation-config", "vllm", "--per-request-spec-decode-metrics", "summary")


class VLLMError(EngineError):
    """A vLLM server that does not start, answer or do what was asked; the message says what and why."""


class VLLMClient(EngineClient):
    """A client of a running vLLM; arguments as of :class:`EngineClient`."""

    engine, error = ENGINE, VLLMError
    watched = ("scheduler", "prefill", "verify")
    _model: str | None = None
    _cpu = False  # as the plugin's status says

    @classmethod
    def launch(
        cls,
        model: str | os.PathLike[str],
        *,
        drafter: str | os.PathLike[str] | None = None,
        depth: int = 3,
        num_slots: int = 4,
        max_length: int = 1024,
        dtype: str = "auto",
        device: str = "cpu",
        python: str | os.PathLike[str] = sys.executable,
        log: str | os.PathLike[str] | None = None,
        keys: str | os.PathLike[str] | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> VLLMClient:
        """Start a server and wait until it answers.

        Args:
            model: Folder or hub id of the target.
            drafter: Folder of an EAGLE-3 drafter in the format "vllm"; None decodes plainly.
            depth: Drafted tokens of a round.
            num_slots: Requests decoded at the same time.
            max_length: Tokens of a request, prompt and completion.
            dtype: Dtype of the weights, "auto" for the checkpoint's.
            device: "cpu" or "cuda".
            python: Python that has vLLM and this package.
            log: File for what the server prints; None takes a temporary one.
            keys: Folder of the engine's keys; see the class.
            arguments: More arguments of ``vllm serve``.
            environment: More environment variables.

        Raises:
            VLLMError: It ends or does not answer within five minutes; the message has the end of its log.
            CheckpointError: The drafter's folder is not one of a drafter that learns with vLLM.
        """
        variables = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1"}
        (port,), drafting = free_ports(1), list[str]()
        if drafter is not None:
            drafting = ["--speculative-config", json.dumps(drafter_config(drafter, depth))]
        command = [
            # Not the command `vllm`, which looks for a package of that name and finds none in vllm-cpu.
            *(str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", dtype),
            *("--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(num_slots)),
            *("--max-model-len", str(max_length), *_ARGUMENTS, *drafting),
        ]
        if device == "cpu":
            command += ["--enforce-eager"]
            variables |= {name: value for name, value in CPU_VARIABLES.items() if name not in os.environ}
        return cls.start(
            [*command, *arguments],
            f"http://127.0.0.1:{port}",
            plugin=drafter is not None,
            environment={**variables, **(environment or {})},
            log=log,
            keys=keys,
        )

    @override
    def generate(
        self, request: Request, *, stop_tokens: Sequence[int] = (), timeout: float = 600.0
    ) -> EngineCompletion:
        self._check_request(request)
        sampling = request.sampling_params
        if self._cpu and sampling.temperature > 0 and sampling.top_k > 0:
            raise VLLMError(
                f"request {request.id}: top_k={sampling.top_k} is not supported on a CPU, where vLLM's sampler ends "
                "the server if top_k meets drafts; leave top_k out"
            )
        if sampling.seed == -1 and sampling.temperature > 0:
            raise VLLMError(f"request {request.id}: seed=-1 is no seed to vLLM; give any other")
        body: dict[str, Any] = {
            "model": self._served(timeout),
            "prompt": request.prompt.tolist(),
            "request_id": str(request.id),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "stop": list(sampling.stop),
            "stop_token_ids": list(stop_tokens),
            "ignore_eos": sampling.ignore_eos,
            "return_token_ids": True,
        }
        if sampling.temperature > 0:
            body["seed"] = sampling.seed
        if not request.learn:
            body["vllm_xargs"] = {"aurora_rl": "false"}
        if request.salt:
            body["cache_salt"] = request.salt
        reply = self.post("/v1/completions", body, timeout)
        (choice,) = reply["choices"]
        drafted = (reply.get("metrics") or {}).get("speculative_decoding") or {}
        return EngineCompletion(
            request,
            torch.tensor(choice["token_ids"], dtype=torch.int64),
            choice["finish_reason"] == "stop",
            int(drafted.get("num_spec_steps") or 0),
            {count: rounds for count, rounds in enumerate(drafted.get("acceptance_histogram") or []) if rounds},
            [],
            int(drafted.get("num_draft_tokens") or 0),
        )

    def _served(self, timeout: float) -> str:
        """Return the name of the model that is served."""
        if self._model is None:
            self._model = self.get("/v1/models", timeout)["data"][0]["id"]
        return self._model

    @override
    def probe(self, status: dict[str, Any]) -> None:
        self._cpu = status["device"] == "cpu"
        super().probe(status)

    @override
    def attach(self, **settings: Any) -> dict[str, Any]:
        super().attach(**settings)
        # The prefix cache has texts that nobody saw. It is emptied after a batch of the session, when nothing runs.
        self.probe(self.status())
        return self.status()


def drafter_config(drafter: str | os.PathLike[str], depth: int) -> dict[str, Any]:
    """Return vLLM's speculative configuration for a drafter's folder in the format "vllm".

    Raises:
        CheckpointError: The folder is not a checkpoint of a drafter that learns with vLLM.
    """
    _, config = read_folder(drafter, "config.json")
    method = learned_method(drafter, config, "vllm_method", LEARNED, engine=ENGINE)
    return {"method": method, "model": str(drafter), "num_speculative_tokens": depth}

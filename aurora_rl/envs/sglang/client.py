"""An SGLang server from outside: launched or attached to, asked by HTTP for completions, by its plugin for the rest."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from typing_extensions import override

from aurora_rl.envs import Request
from aurora_rl.envs.remote.client import EngineClient, EngineCompletion, EngineError, free_ports, learned_method
from aurora_rl.envs.sglang import ENGINE, LEARNED
from aurora_rl.policies.formats.vllm import LAYER_IDS
from aurora_rl.storage import CheckpointError, read_folder

# The attention backend that knows trees; named for all uses at once, it is replaced on a CPU without AMX. Idle, a
# scheduler would spin and keep a core from the learner.
CPU_ARGUMENTS = [
    *(f"--{use}-backend=intel_amx" for use in ("prefill-attention", "decode-attention", "speculative-draft-attention")),
    *("--disable-cuda-graph", "--grammar-backend=none", "--sleep-on-idle"),
]
"""What SGLang's server needs on a CPU, next to ``--device cpu``."""
CPU_VARIABLES = {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"}
"""And its environment."""


class SGLangError(EngineError):
    """An SGLang server that does not start, answer or do what was asked; the message says what and why."""


class SGLangClient(EngineClient):
    """A client of a running SGLang; arguments as of :class:`EngineClient`."""

    engine, error = ENGINE, SGLangError
    _argmax = False  # whether it verifies by argmax, whatever the temperature

    @classmethod
    def launch(
        cls,
        model: str | os.PathLike[str],
        *,
        drafter: str | os.PathLike[str] | None = None,
        depth: int = 3,
        width: int = 1,
        num_nodes: int = 4,
        num_slots: int = 4,
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
            num_slots: Requests decoded at the same time.
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
        path = cls.log_file(log)
        variables = dict(environment or {})
        ranks, (port,) = ranks_of(arguments), free_ports(1)
        context, drafting = max_length + _OWN_PLACES, list[str]()
        if drafter is not None:
            context = max_length + reserved_context(depth, width, num_nodes)
            drafting = [
                *drafter_arguments(drafter, path.with_suffix(".token_map.pt")),
                *("--speculative-num-steps", str(depth), "--speculative-eagle-topk", str(width)),
                *("--speculative-num-draft-tokens", str(num_nodes + 1)),
            ]
        command = [
            *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--dtype", dtype),
            *("--host", "127.0.0.1", "--port", str(port), "--device", device),
            *("--max-running-requests", str(num_slots), "--context-length", str(context)),
            *("--skip-server-warmup", "--log-level", "warning", *drafting),
        ]
        if device == "cpu":
            # Left to itself, the cache takes most of the machine's free memory.
            command += [*CPU_ARGUMENTS, "--max-total-tokens", str(2 * num_slots * context)]
            variables |= CPU_VARIABLES
            if ranks > 1 and "SGLANG_CPU_OMP_THREADS_BIND" not in os.environ:
                variables.setdefault("SGLANG_CPU_OMP_THREADS_BIND", cores_of(ranks))
        return cls.start(
            [*command, *arguments],
            f"http://127.0.0.1:{port}",
            plugin=drafter is not None,
            environment=variables,
            log=path,
            keys=keys,
        )

    # ---- requests -------------------------------------------------------------------------------------------------

    @override
    def generate(
        self, request: Request, *, stop_tokens: Sequence[int] = (), timeout: float = 600.0
    ) -> EngineCompletion:
        sampling = request.sampling_params
        self._check_request(request)
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
        return EngineCompletion(
            request,
            torch.tensor(reply["output_ids"], dtype=torch.int64),
            (meta.get("finish_reason") or {}).get("type") == "stop",
            int(meta.get("spec_verify_ct") or 0),
            {count: rounds for count, rounds in enumerate(histogram) if rounds},
            [int(span["version"]) for span in meta.get("weight_versions") or [] if str(span["version"]).isdecimal()],
            int(meta.get("spec_num_proposed_drafts") or 0),
        )

    @override
    def probe(self, status: dict[str, Any]) -> None:
        self._argmax = status["device"] == "cpu"
        super().probe(status)


def ranks_of(arguments: Sequence[str]) -> int:
    """Return how many processes with a part of the model SGLang's arguments start, over all replicas.

    >>> ranks_of(["--tp-size", "2", "--dp-size=3", "--log-level", "info"])
    6
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for names in (("--tp-size", "--tp", "--tensor-parallel-size"), ("--dp-size", "--dp", "--data-parallel-size")):
        parser.add_argument(*names, type=int, default=1)
    found, _ = parser.parse_known_args(list(arguments))
    return found.tp_size * found.dp_size


def cores_of(ranks: int) -> str:
    """Return the cores of each rank on a CPU as SGLang takes them; left to itself it has one rank for a NUMA node."""
    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // ranks)
    own = ([cores[(rank * share + i) % len(cores)] for i in range(share)] for rank in range(ranks))
    return "|".join(",".join(map(str, each)) for each in own)


def drafter_arguments(drafter: str | os.PathLike[str], token_map: str | os.PathLike[str]) -> list[str]:
    """Return SGLang's arguments for a drafter's folder in the format "sglang".

    A reduced draft vocabulary is written to ``token_map``; EAGLE-3's stays in the folder.

    Raises:
        CheckpointError: The folder is not a checkpoint of a drafter that learns with SGLang.
    """
    tensors, config = read_folder(drafter, "config.json")
    algorithm = learned_method(drafter, config, "sglang_algorithm", LEARNED, engine=ENGINE)
    if min((config.get("eagle_config") or {}).get(LAYER_IDS) or [0]) < 0:
        raise CheckpointError(
            f"{drafter}: the drafter reads what enters layer 0, which SGLang cannot read; start a drafter of layers "
            "from 1 on (drafter.feature_layers)"
        )
    arguments = ["--speculative-algorithm", algorithm, "--speculative-draft-model-path", str(drafter)]
    if algorithm != "EAGLE3" and "d2t" in tensors:
        torch.save((tensors["d2t"] + torch.arange(len(tensors["d2t"]))).tolist(), token_map)
        arguments += ["--speculative-token-map", str(token_map)]
    return arguments


_OWN_PLACES = 6


def reserved_context(depth: int, width: int, num_nodes: int) -> int:
    """Return how many places of a request's context SGLang keeps for its drafts and for itself.

    >>> reserved_context(3, 4, 6)
    18
    """
    return max(width * depth, num_nodes + 1) + _OWN_PLACES

"""The serving half of a run whose engine is another process, launched or attached to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aurora_rl.cli.assembly import USUAL_LENGTH, LoadedTarget, wire_keys
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.spec import RunSpec
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import plugin_client_keys
from aurora_rl.envs import SamplingParams
from aurora_rl.envs.processors import text_settings
from aurora_rl.envs.remote.client import EngineClient, EngineError
from aurora_rl.envs.remote.plugin_server import PluginError, ask
from aurora_rl.envs.sglang.client import SGLangClient, reserved_context
from aurora_rl.envs.vllm.client import VLLMClient
from aurora_rl.models.loading import DEFAULT_TARGET, embedded_model_path, stop_token_ids
from aurora_rl.policies import Drafter
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.serving.attached import AttachedServer, DrivenServer
from aurora_rl.serving.requests import RequestSource
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.training.states import newest_valid

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Engine:
    """Differences of one engine from the others."""

    client: type[Any]
    shape: Callable[..., dict[str, int]]  # arguments of `launch` for a round, from depth, width and num_nodes
    reserved: Callable[..., int]  # places of a request's context that it keeps for drafts, from the same
    raw_logits: str  # its arguments that leave the model's generation config out
    cpu_fault: Callable[[SamplingParams], str]  # why it cannot sample so on a CPU, with the fix; empty if it can


def _sglang_cpu_fault(sampling: SamplingParams) -> str:
    if not sampling.temperature:
        return ""
    return f"temperature={sampling.temperature:g}: on a CPU SGLang verifies by argmax; set temperature=0"


def _vllm_cpu_fault(sampling: SamplingParams) -> str:
    if not sampling.temperature or sampling.top_k <= 0:
        return ""
    return f"top_k={sampling.top_k}: on a CPU vLLM's sampler ends the server if top_k meets drafts; set top_k=0"


_ENGINES = {
    "sglang": _Engine(SGLangClient, dict, reserved_context, "--sampling-defaults openai", _sglang_cpu_fault),
    "vllm": _Engine(
        VLLMClient,
        lambda depth, **_: {"depth": depth},
        lambda **_: 0,  # it takes drafts beyond the context away by itself
        "--generation-config vllm",
        _vllm_cpu_fault,
    ),
}


def remote_server(
    spec: RunSpec,
    target: LoadedTarget,
    requests: RequestSource | None,
    drafter: Drafter,
    log: MetricsLog,
    run_dir: Path,
) -> AttachedServer:
    """Build a server on an engine of another process, which is launched here or attached to.

    The target's model moves to the CPU. ``requests`` is None if clients of the engine send theirs. The run's folder has
    the learner's states, and gets the engine's log and the drafter to serve.

    Raises:
        ConfigError: The engine does not start or answer, or cannot serve what is asked of it.
    """
    config, settings = spec.config, spec.config.engine
    engine, name = _ENGINES[settings.name], REMOTE_ENGINES[settings.name]
    handshake = Handshake.of(target.parts, drafter, spec.drafter_name)
    if config.generation_config == "auto" and (found := text_settings(target.model.generation_config)):
        values = ", ".join(f"{name}={value!r}" for name, value in found.items())
        if requests is None:
            logger.warning(
                "the model's generation config sets %s; requests that %s serves with that are not recorded: start "
                "it with %s",
                *(values, name, engine.raw_logits),
            )
        else:
            raise ConfigError(
                f"model={config.model}: its generation config sets {values}, and {name} verifies drafts without that; "
                "set generation_config=ignore to serve raw logits, or engine.name=transformers"
            )
    stop_tokens = stop_token_ids(target.model, target.tokenizer)
    target.model.cpu()  # the server loads its own, on the device that this one leaves
    if spec.device.type == "cuda":
        torch.cuda.empty_cache()
    with naming(f"engine.name={settings.name}", (EngineError, PluginError)):
        if settings.url is None:
            client: EngineClient = _launch(spec, drafter, target.parts.config.max_position_embeddings, run_dir)
        else:
            client = engine.client(settings.url, settings.plugin_address, keys=config.wire.keys)

        def attach() -> dict[str, Any]:
            return client.attach(
                handshake=handshake,
                trajectories=config.wire.trajectories,
                weights=config.wire.weights,
                capture_rate=settings.capture_rate,
                part_tokens=settings.part_tokens,
                queue=config.wire.queue,
                queue_bytes=config.wire.queue_bytes,
                max_age=config.privacy.max_age,
                max_message=config.wire.max_message,
            )

        def published() -> Path | None:
            state, _ = newest_valid(run_dir / "learner")
            return None if state is None else state / "drafter"

        try:
            if requests is None:
                return AttachedServer(client, attach, log=log, published=published)
            if config.min_p and config.temperature:
                raise PluginError(
                    f"min_p={config.min_p:g}: {name} does not apply it when it verifies drafts; set min_p=0, or "
                    "engine.name=transformers"
                )
            fault = engine.cpu_fault(spec.sampling_params)
            if fault and client.status()["device"] == "cpu":
                raise PluginError(f"{fault}, or engine.name=transformers")
            return DrivenServer(
                client,
                attach,
                requests,
                num_slots=settings.slots,
                stop_tokens=stop_tokens,
                log=log,
                note=requests.completed,
                on_refused=requests.refused,
                published=published,
            )
        except BaseException:
            client.close()
            raise


def served_config(config: Config) -> Config:
    """Return the configuration with what the server at ``engine.url`` decides: model, dtype, lengths and tree shape.

    A model or a dtype that was configured stays, and is compared with the server's when the learner attaches.

    Raises:
        ConfigError: The plugin does not answer.
    """
    engine, name = _ENGINES[config.engine.name], REMOTE_ENGINES[config.engine.name]
    with naming("engine.plugin_address", (PluginError, OSError)):
        keys = wire_keys(config, plugin_client_keys)
        status = ask(str(config.engine.plugin_address), "status", engine=name, keys=keys)
    shape = {name: status[name] for name in ("depth", "width", "num_nodes")}
    return replace(
        config,
        model=status["model"] if config.model == Config.model else config.model,
        dtype=status["dtype"] if config.dtype == "auto" else config.dtype,
        engine=replace(config.engine, max_length=status["context"] - engine.reserved(**shape)),
        drafter=replace(config.drafter, **shape),
    )


def _launch(spec: RunSpec, drafter: Drafter, context: int, run_dir: Path) -> EngineClient:
    """Launch the engine on the drafter; ``context`` is the model's."""
    config, folder, tree = spec.config, run_dir / "drafter-served", spec.tree
    engine = _ENGINES[config.engine.name]
    shape = {"depth": tree.depth, "width": tree.width, "num_nodes": tree.num_nodes}
    room = context - engine.reserved(**shape)
    length = min(USUAL_LENGTH, room) if config.engine.max_length is None else config.engine.max_length
    if length > room:
        raise engine.client.error(
            f"engine.max_length={length} and the drafts exceed the model's context of {context}; "
            f"set engine.max_length={room} or less"
        )
    save_drafter(drafter, folder, config.engine.name)
    launched: EngineClient = engine.client.launch(
        embedded_model_path() if config.model == DEFAULT_TARGET else config.model,
        drafter=folder,
        **engine.shape(**shape),
        num_slots=config.engine.slots,
        max_length=length,
        dtype=str(spec.dtype).removeprefix("torch."),
        device=spec.device.type,
        log=run_dir / f"{config.engine.name}.log",
        keys=config.wire.keys,
        arguments=config.engine.arguments,
    )
    return launched

"""Refusals of a running vLLM, by name, before anything is recorded."""

from __future__ import annotations

from typing import Any

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.envs.remote.checks import check_target
from aurora_rl.envs.remote.plugin_server import PluginError
from aurora_rl.envs.vllm import LEARNED
from aurora_rl.envs.vllm.weights import draft_vocab

SUPPORTED = ("0.32.0",)
"""Versions of vLLM whose functions the hooks were written for."""

_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size")


def check_server(config: Any, *, missing: list[str], version: str) -> None:
    """Refuse a version of vLLM, ``missing`` hooks, and a configuration whose rounds are not recorded.

    Raises:
        PluginError: Names what was found, and what to do.
    """
    if version not in SUPPORTED:
        raise PluginError(f"vLLM {version} is not supported; install vllm=={SUPPORTED[-1]}")
    if missing:
        raise PluginError(
            f"hooks are not in force in vLLM {version}: {', '.join(missing)}; another plugin removed them"
        )
    if config.use_v2_model_runner:
        raise PluginError(
            "this server runs vLLM's model runner V2, whose rounds are not recorded; set VLLM_USE_V2_MODEL_RUNNER=0 in "
            "its environment"
        )
    if config.scheduler_config.async_scheduling:
        raise PluginError("asynchronous scheduling is not recorded; start the server with --no-async-scheduling")
    sizes = {name: getattr(config.parallel_config, name, 1) for name in _SIZES}
    if set(sizes.values()) != {1}:
        found = ", ".join(f"{name}={size}" for name, size in sizes.items() if size != 1)
        raise PluginError(f"a server of one worker is needed, this has {found}")
    drafting = config.speculative_config
    if drafting is None or drafting.method not in LEARNED:
        raise PluginError(
            f"the speculative method is {None if drafting is None else drafting.method!r}; start the server with "
            f'--speculative-config \'{{"method": "{LEARNED[0]}", "model": DRAFTER, "num_speculative_tokens": 3}}\''
        )
    if drafting.parallel_drafting:
        raise PluginError("parallel drafting is not recorded; leave parallel_drafting out of --speculative-config")
    if drafting.uses_dynamic_speculative_decoding():
        raise PluginError(
            "leave num_speculative_tokens_per_batch_size out of --speculative-config: one length is recorded"
        )
    if drafting.rejection_sample_method != "standard":
        raise PluginError(
            f"rejection_sample_method={drafting.rejection_sample_method!r} has another law of acceptance than is "
            "recorded; leave it at 'standard'"
        )
    if drafting.draft_sample_method != "greedy":
        raise PluginError(f"draft_sample_method={drafting.draft_sample_method!r} is not recorded; leave it at 'greedy'")
    if config.model_config.logits_processors:
        raise PluginError("--logits-processors change the distribution that is served; start the server without them")
    if config.weight_transfer_config is not None:
        raise PluginError(
            "weights that others transfer into the server change the target that the learner has; leave "
            "--weight-transfer-config out"
        )
    if config.model_config.enable_sleep_mode:
        raise PluginError("a server that may sleep unmaps what weights are loaded into; leave --enable-sleep-mode out")
    if config.device_config.device_type == "cpu" and int(config.compilation_config.mode):
        raise PluginError(
            "on a CPU compiled code may keep the drafter's weights; start the server with --enforce-eager"
        )


def check_models(runner: Any, handshake: Handshake) -> None:
    """Refuse another target, other feature layers or another draft vocabulary than the learner's handshake says.

    Raises:
        PluginError: Names what differs, and what to do.
    """
    target, config = runner.get_model(), runner.model_config.hf_text_config
    layers = tuple(getattr(getattr(target, "model", None), "aux_hidden_state_layers", ()))
    if layers != handshake.feature_layers:
        raise PluginError(
            f"feature_layers is {handshake.feature_layers} at the learner and {layers} at the engine; give vLLM a "
            "folder that was written for it (aurora-rl drafter export --to vllm)"
        )
    if getattr(target, "lm_head", None) is None:
        raise PluginError(f"{type(target).__name__} has no output head of its own, which the learner needs")
    draft = runner.get_draft_model()
    if getattr(getattr(draft, "model", None), "embed_tokens", None) is not getattr(target.model, "embed_tokens", None):
        raise PluginError(
            "the drafter has an embedding of its own, and the learner's reads the target's; give vLLM a folder without "
            "one (aurora-rl drafter export --to vllm)"
        )
    check_target(
        handshake,
        head=target.lm_head.weight,
        bias=getattr(target.lm_head, "bias", None),
        config=config,
        vocab=draft_vocab(draft),
        folder="one folder",
    )

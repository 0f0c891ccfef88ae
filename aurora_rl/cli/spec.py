"""The configuration, resolved once into the arguments of a run's parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from aurora_rl.cli.arguments import as_pair
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.frozen import plain
from aurora_rl.envs import Engine, SamplingParams, get_engine, get_rule, sglang, vllm
from aurora_rl.envs.verification.rules import require_replayable
from aurora_rl.models.loading import default_dtype, usable_device
from aurora_rl.objectives import check_settings
from aurora_rl.policies import Drafter, TreeShape, get_drafter
from aurora_rl.policies.formats.files import drafter_class
from aurora_rl.policies.registry import DRAFTERS
from aurora_rl.policies.tree_shape import USUAL_LOOKUP
from aurora_rl.remote_engines import REMOTE_ENGINES

_MAX_NEW_TOKENS = 96  # budget of traffic that names none


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A configuration, resolved once: what the parts of a run are built from.

    Attributes:
        config: Configuration, frozen. What stands below is read here, not there. Only
            ``max_new_tokens`` is read there too, by the HTTP server, which must know whether it was given.
        device: Device of the target.
        dtype: Dtype in which the target and the drafter are served.
        engine_class: Class of the engine in this process; None if another process serves.
        rule: Name of the verification rule.
        tree: Shape of the trees that are drafted.
        drafter_name: Name of the drafter's architecture.
        drafter_class: Architecture of the drafter.
        sampling_params: Parameters of a request that says nothing of its own. The seed is the first request's.
        vocab_follows: Whether the draft vocabulary follows the traffic, if the drafter can.
    """

    config: Config
    device: torch.device
    dtype: torch.dtype
    engine_class: type[Engine] | None
    rule: str
    tree: TreeShape
    drafter_name: str
    drafter_class: type[Drafter]
    sampling_params: SamplingParams
    vocab_follows: bool


def resolve(config: Config) -> RunSpec:
    """Resolve a configuration, and find what is wrong with it before a model is loaded.

    Raises:
        ConfigError: The message names the key, the value and the fix.

    Example:
        >>> from aurora_rl.cli.config import load_config
        >>> resolve(load_config(overrides=["device=cpu", "dtype=float32", "drafter.depth=3"])).tree.depth
        3
    """
    if config.compare:
        raise ConfigError(f"compare={list(config.compare)} is of aurora-rl serve and aurora-rl flywheel; leave it out")
    try:
        device = usable_device(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    engine_class = _engine_class(config)
    name, rule = config.drafter.name or "medusa", _rule(config)
    if config.drafter.name is None and config.drafter.path is not None:
        name = DRAFTERS.name_of(drafter_class(config.drafter.path))
    kind, tree = _drafter_class(config, name), _shape(config, name, engine_class)
    if not config.objectives:
        raise ConfigError("objectives is empty; name at least one, such as objectives=[{name: imitation}]")
    with naming("objectives"):
        for settings in plain(config.objectives):
            check_settings(settings).check_served(settings, tree)
    dtype = default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype)
    budget = config.max_new_tokens or _MAX_NEW_TOKENS
    sampling = SamplingParams(config.temperature, config.top_k, config.top_p, config.seed, budget, min_p=config.min_p)
    return RunSpec(
        config, device, dtype, engine_class, rule, tree, name, kind, sampling, _vocab_follows(config, name, kind)
    )


def _engine_class(config: Config) -> type[Engine] | None:
    """Return the class of the engine in this process; None if another process serves."""
    settings = config.engine
    if settings.remote:
        return None
    for key in ("url", "plugin_address", "arguments"):
        if value := getattr(settings, key):
            raise ConfigError(
                f"{as_pair(f'engine.{key}', value)} has no effect with engine.name={settings.name}, which serves in "
                "this process; set engine.name=sglang or engine.name=vllm, or leave the key out"
            )
    with naming("engine.name"):
        return get_engine(settings.name)


def _vocab_follows(config: Config, name: str, kind: type[Drafter]) -> bool:
    """Return whether the draft vocabulary is to follow the traffic."""
    asked, mode, adapters = config.drafter.vocab_follows, config.drafter.mode, list(config.drafter.adapters)
    reasons = {
        f"engine.name={config.engine.name}, whose map of draft tokens is read once": config.engine.remote,
        # Rewards need the rows of all tokens that were drawn.
        f"drafter.mode={mode}, whose draws would lose their rows": mode != "topk",
        f"drafter.adapters={adapters}, which share the rows": bool(adapters),
        f"learner.parallel={config.learner.parallel}, whose ranks share them": config.learner.parallel is not None,
        "privacy.zero_retention=true, which keeps no answers": config.privacy.zero_retention,
    }
    if asked and kind.vocab_tables is Drafter.vocab_tables:
        raise ConfigError(
            f"drafter.vocab_follows=true: drafter.name={name} has no rows that could be another token's; leave it out, "
            "or set it to false"
        )
    if asked and (found := [reason for reason, holds in reasons.items() if holds]):
        raise ConfigError(f"drafter.vocab_follows=true does not go with {found[0]}; leave it out, or set it to false")
    return not any(reasons.values()) if asked is None else asked


def _rule(config: Config) -> str:
    """Return the name of the verification rule. Looking it up makes it known to the objectives."""
    name = config.rule or "sample_and_match"
    with naming("rule"):
        rule = get_rule(name)
        require_replayable(rule)
    if config.drafter.mode not in rule.draft_modes:
        raise ConfigError(
            f"rule={name} needs drafter.mode={' or '.join(rule.draft_modes)}, got drafter.mode={config.drafter.mode}"
        )
    if rule.name == "greedy" and config.temperature > 0:
        raise ConfigError(f"rule=greedy needs temperature=0, got {config.temperature:g}; set rule=null to sample")
    return name


def _drafter_class(config: Config, name: str) -> type[Drafter]:
    settings = config.drafter
    with naming("drafter.name"):
        kind = get_drafter(name)
    with naming("drafter.options"):
        kind.check_options(plain(settings.options))
    if settings.mode not in kind.draft_modes:
        raise ConfigError(
            f"drafter.name={name} drafts in mode {' or '.join(kind.draft_modes)}, not drafter.mode="
            f"{settings.mode}; set drafter.name=eagle3 to draw its nodes"
        )
    if settings.adapters and not kind.takes_adapters:
        raise ConfigError(
            f"drafter.adapters={list(settings.adapters)}: drafter.name={name} takes none; set drafter.name=eagle3, or "
            "leave the key out"
        )
    learned = {"sglang": (kind.sglang_algorithm, sglang.LEARNED), "vllm": (kind.vllm_method, vllm.LEARNED)}
    engine = config.engine.name
    if engine in learned and learned[engine][0] not in learned[engine][1]:
        title = REMOTE_ENGINES[engine]
        served = f"{title} does not serve it" if learned[engine][0] is None else f"{title} serves it as it is"
        raise ConfigError(
            f"drafter.name={name} does not learn with {title} ({served}); with engine.name={engine} set "
            "drafter.name=eagle3"
        )
    return kind


def _shape(config: Config, name: str, engine: type[Engine] | None) -> TreeShape:
    """Return the tree shape that the configuration asks for."""
    settings, lookup = config.drafter, config.drafter.lookup
    if lookup is None:
        takes_it = config.engine.name == "transformers" and settings.mode == "topk" and name != "ngram"
        lookup = USUAL_LOOKUP if takes_it else 0
    elif lookup and config.engine.remote:
        raise ConfigError(
            f"drafter.lookup={lookup}: trees of {REMOTE_ENGINES[config.engine.name]} take no lookup; leave the key "
            "out, or set it to 0"
        )
    if settings.num_nodes is not None and settings.num_nodes < settings.depth:
        # Not "or null": that keeps all nodes, at this width often more than the engine verifies.
        raise ConfigError(
            f"drafter.depth={settings.depth} is more than drafter.num_nodes={settings.num_nodes}, and a tree holds one "
            f"path of that depth at least; set drafter.num_nodes={settings.depth} or more"
        )
    with naming("drafter"):
        tree = TreeShape(settings.depth, settings.width, settings.num_nodes, settings.mode, lookup)
    if engine is not None and lookup > engine.max_nodes:
        raise ConfigError(
            f"drafter.lookup={lookup}: the engine verifies {engine.max_nodes} nodes at most; set it to that"
        )
    if engine is not None and tree.num_nodes > engine.max_nodes:
        num_nodes = "null" if settings.num_nodes is None else settings.num_nodes
        raise ConfigError(
            f"drafter.depth={settings.depth}, drafter.width={settings.width} and drafter.num_nodes={num_nodes} make "
            f"trees of {tree.num_nodes} nodes, and the engine verifies {engine.max_nodes} at most; set "
            f"drafter.num_nodes={engine.max_nodes} or less"
        )
    return tree

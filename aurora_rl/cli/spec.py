"""The configuration, resolved once, and what both halves of a run are built from."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aurora_rl.cli.config import Config, ConfigError, naming
from aurora_rl.envs import Engine, SamplingParams, get_engine, get_rule
from aurora_rl.envs.verification.rules import require_replayable
from aurora_rl.models.loading import default_dtype, load_target, usable_device
from aurora_rl.models.target_head import context_length
from aurora_rl.objectives import check_settings
from aurora_rl.policies import Drafter, TargetParts, TreeShape, choose_draft_vocab, get_drafter, token_prior
from aurora_rl.policies.formats.files import drafter_class, load_drafter, save_drafter, written
from aurora_rl.policies.registry import drafter_name
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.workload.traffic import Prompt, generate, read_jsonl


@dataclass(frozen=True, slots=True)
class RunSpec:
    """A configuration, resolved once: what the parts of a run are built from.

    Attributes:
        config: Configuration. What stands below is read here, not there.
        device: Device of the target.
        dtype: Dtype in which the target and the drafter are served.
        engine_class: Class of the engine in this process; None if SGLang serves.
        rule: Name of the verification rule.
        tree: Shape of the trees that are drafted.
        drafter_name: Name of the drafter's architecture.
        drafter_class: Architecture of the drafter.
        sampling: Parameters of a request that says nothing of its own. The seed is the first request's.
    """

    config: Config
    device: torch.device
    dtype: torch.dtype
    engine_class: type[Engine] | None
    rule: str
    tree: TreeShape
    drafter_name: str
    drafter_class: type[Drafter]
    sampling: SamplingParams


def resolve(config: Config) -> RunSpec:
    """Resolve a configuration, and find what is wrong with it before a model is loaded.

    Raises:
        ConfigError: The message names the key, the value and the fix.

    Example:
        >>> from aurora_rl.cli.config import load_config
        >>> resolve(load_config(overrides=["device=cpu", "dtype=float32", "drafter.depth=3"])).tree.depth
        3
    """
    try:
        device = usable_device(config.device)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    with naming("engine.name"):
        engine_class = None if config.engine.name == "sglang" else get_engine(config.engine.name)
    name, rule = config.drafter.name or "medusa", _rule(config)
    if config.drafter.name is None and config.drafter.path is not None:
        name = drafter_name(drafter_class(config.drafter.path))
    kind, tree = _drafter_class(config, name), _shape(config, name, engine_class)
    if not config.objectives:
        raise ConfigError("objectives is empty; name at least one, such as objectives=[{name: imitation}]")
    with naming("objectives"):
        for settings in config.objectives:
            check_settings(settings).check_served(settings, tree)
    return RunSpec(
        config,
        device,
        default_dtype(device) if config.dtype == "auto" else getattr(torch, config.dtype),
        engine_class,
        rule,
        tree,
        name,
        kind,
        SamplingParams(config.temperature, config.top_k, config.top_p, config.seed, config.max_new_tokens),
    )


def _rule(config: Config) -> str:
    """The name of the verification rule, which is looked up and so made known to the objectives."""
    name = config.rule or "sample_and_match"
    with naming("rule"):
        rule = get_rule(name)
        require_replayable(rule)
    if config.drafter.mode not in rule.draft_modes:
        raise ConfigError(
            f"rule={name} needs drafter.mode={' or '.join(rule.draft_modes)}, got drafter.mode={config.drafter.mode}"
        )
    if name == "greedy" and config.temperature > 0:
        raise ConfigError(f"rule=greedy needs temperature=0, got {config.temperature:g}; set rule=null to sample")
    return name


def _drafter_class(config: Config, name: str) -> type[Drafter]:
    settings = config.drafter
    with naming("drafter.name"):
        kind = get_drafter(name)
    with naming("drafter.options"):
        kind.check_options(settings.options)
    if settings.mode not in kind.draft_modes:
        raise ConfigError(
            f"drafter.name={name} drafts in mode {' or '.join(kind.draft_modes)}, not drafter.mode="
            f"{settings.mode}; set drafter.name=eagle3 to draw its nodes"
        )
    if config.engine.name == "sglang" and kind.sglang_algorithm is None:
        raise ConfigError(
            f"drafter.name={name} is none that SGLang has; with engine.name=sglang set drafter.name=eagle3"
        )
    return kind


def _shape(config: Config, name: str, engine: type[Engine] | None) -> TreeShape:
    """The tree that the configuration asks for."""
    settings, lookup = config.drafter, config.drafter.lookup
    if lookup is None:
        takes_it = config.engine.name == "transformers" and settings.mode == "topk" and name != "ngram"
        lookup = 2 if takes_it else 0
    elif lookup and config.engine.name == "sglang":
        raise ConfigError(f"drafter.lookup={lookup}: SGLang's trees take no lookup; leave the key out, or set it to 0")
    with naming("drafter"):
        tree = TreeShape(settings.depth, settings.width, settings.num_nodes, settings.mode, lookup)
    if engine is not None and tree.num_nodes > engine.max_nodes:
        budget = "null" if settings.num_nodes is None else settings.num_nodes
        raise ConfigError(
            f"drafter.depth={settings.depth}, drafter.width={settings.width} and drafter.num_nodes={budget} make trees "
            f"of {tree.num_nodes} nodes, and the engine verifies {engine.max_nodes} at most; set drafter.num_nodes="
            f"{engine.max_nodes} or less"
        )
    return tree


# ---- what is built from it ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target, its tokenizer, and the copies of its parts that drafters use."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: TargetParts


def load(spec: RunSpec) -> Target:
    """Load the target."""
    model, tokenizer = load_target(spec.config.model, dtype=spec.dtype, device=spec.device)
    return Target(model, tokenizer, TargetParts.of(model))


def check_context(config: Config, target: Target) -> None:
    """Raise ConfigError where slots are to be longer than the model's context."""
    context = context_length(target.parts.config)
    if context is not None and config.engine.max_length > context:
        raise ConfigError(
            f"engine.max_length={config.engine.max_length} exceeds the context of model {config.model!r}; "
            f"set engine.max_length={context} or less"
        )


def traffic(config: Config) -> list[Prompt]:
    """The prompts of the run, all read and checked."""
    source = config.traffic
    if source.path is not None:
        return read_jsonl(source.path, limit=source.limit, shuffle=source.shuffle, seed=config.seed)
    return generate(min(source.requests, source.limit or source.requests), seed=config.seed)


def request_queue(spec: RunSpec, target: Target, prompts: Sequence[Prompt]) -> RequestQueue:
    """The run's requests, in order."""
    config = spec.config
    check_context(config, target)
    return RequestQueue(
        prompts,
        target.tokenizer,
        vocab_size=target.parts.config.vocab_size,
        max_length=config.engine.max_length,
        sampling=spec.sampling,
    )


def start_drafter(spec: RunSpec, target: Target, prompts: list[list[int]], seed: int | None = None) -> Drafter:
    """The drafter that the run starts with, in float32 on the CPU.

    Args:
        spec: Names a checkpoint, or the architecture of an untrained drafter.
        target: The loaded target, before an engine has it.
        prompts: First prompts, for the draft vocabulary of an untrained drafter; may be empty.
        seed: Seed of an untrained drafter's weights; None takes the configuration's.

    Raises:
        ConfigError: Settings that do not fit, such as trees deeper than the drafter drafts.
        ValueError: A checkpoint that does not fit the target.
    """
    drafter = _new_or_loaded(spec, target, prompts, spec.config.seed if seed is None else seed)
    if spec.tree.depth > drafter.max_depth:
        raise ConfigError(
            f"drafter.depth={spec.tree.depth} is more than the {drafter.max_depth} nodes that this drafter drafts "
            "one after the other; set it to that, or start a deeper drafter by drafter.options"
        )
    if drafter.formats:
        with naming(f"drafter.name={spec.drafter_name} cannot be saved"):  # now, not after hours of learning
            written(drafter, "sglang" if spec.config.engine.name == "sglang" else None)
    return drafter


def _new_or_loaded(spec: RunSpec, target: Target, prompts: list[list[int]], seed: int) -> Drafter:
    settings, kind = spec.config.drafter, spec.drafter_class
    if settings.path is not None:
        return load_drafter(settings.path, target.parts, kind, options=settings.options, made_for=settings.made_for)
    torch.manual_seed(seed)
    vocab = choose_draft_vocab(min(settings.vocab_size, len(target.parts.head)), token_prior(target.model, prompts))
    layers = tuple(settings.feature_layers) if settings.feature_layers else None
    with naming(f"drafter.name={spec.drafter_name}", (TypeError, ValueError)):
        started = kind.from_target(target.parts, draft_vocab=vocab, feature_layers=layers, **settings.options)
    if not isinstance(started, Drafter):
        raise ConfigError(f"drafter.name={spec.drafter_name}: from_target gave {started!r} and no drafter")
    # What started it belongs to its checkpoint, also where its class does not say so.
    started.options = started.options or settings.options
    started.made_for = target.parts.fingerprint
    return started


def first_drafter(spec: RunSpec, target: Target, requests: RequestQueue, folder: Path | None) -> tuple[Drafter, Config]:
    """The drafter that is served first, and the configuration of a learner that starts from the same one.

    Args:
        spec: Spec of the run.
        target: Target of the run.
        requests: Requests of the run, whose first prompts shape the draft vocabulary.
        folder: Folder to save it to, for a learner of our own. None for a learner that is started apart: it does not
            know the prompts.
    """
    config = spec.config
    if folder is None or config.drafter.path is not None:
        return start_drafter(spec, target, []), config
    drafter = start_drafter(spec, target, requests.first_prompts(64))
    if not drafter.formats:
        return drafter, config
    save_drafter(drafter, folder)
    return drafter, replace(config, drafter=replace(config.drafter, path=str(folder)))


@contextmanager
def opening(key: str, address: str) -> Iterator[None]:
    """Errors of an address name the key to set."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{address} is in use; stop the process that holds it, or set {key} to another address on both sides"
            ) from error
        raise ConfigError(f"{key}: {error.strerror}") from error

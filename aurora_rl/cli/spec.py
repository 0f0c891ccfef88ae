"""From a configuration to the parts of a run. This and ``engines`` alone read the configuration."""

from __future__ import annotations

import copy
import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tensordict import TensorDictBase
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aurora_rl.cli.config import Config, ConfigError
from aurora_rl.collectors.codec import checksum
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.envs import Engine, SamplingParams, get_engine, get_rule
from aurora_rl.envs.verification.rules import require_replayable, rule_of_code
from aurora_rl.memory import return_freed_memory
from aurora_rl.models.loading import default_dtype, load_target
from aurora_rl.models.target_head import context_length
from aurora_rl.objectives import SumLoss, check_settings, make_objectives
from aurora_rl.policies import Drafter, TargetParts, TreeShape, choose_draft_vocab, get_drafter, token_prior
from aurora_rl.policies.formats.files import load_drafter, save_drafter, written
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.training.gate import Gate
from aurora_rl.training.learner import Learner
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.trajectories import validate
from aurora_rl.workload.traffic import Prompt, generate, read_jsonl

SCHEMA = 2
"""Version of the trajectory layout."""


@dataclass(frozen=True, slots=True)
class Target:
    """A loaded target, its tokenizer, and the copies of its parts that drafters use."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: TargetParts


def device_of(config: Config) -> torch.device:
    """The device that ``device`` names; "auto" is CUDA where there is one."""
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device={name!r} cannot be used here ({str(error).splitlines()[0]}); try cpu") from error
    return device


def dtype_of(config: Config) -> torch.dtype:
    """The dtype that ``dtype`` names; "auto" is bfloat16 where the device has it."""
    return default_dtype(device_of(config)) if config.dtype == "auto" else getattr(torch, config.dtype)


def load(config: Config) -> Target:
    """Load the target."""
    model, tokenizer = load_target(config.model, dtype=dtype_of(config), device=device_of(config))
    return Target(model, tokenizer, TargetParts.of(model))


def check(config: Config) -> list[Prompt]:
    """Find what is wrong with a serving configuration before a model is loaded. Returns the prompts of the run."""
    device_of(config)
    engine_class(config)
    rule_name(config)
    _drafter_class(config)
    check_objectives(config)
    return traffic(config)


def engine_class(config: Config) -> type[Engine] | None:
    """The class of the engine in this process; None where SGLang serves."""
    if config.engine.name == "sglang":
        return None
    try:
        return get_engine(config.engine.name)
    except ValueError as error:
        raise ConfigError(f"engine.name: {error}") from error


def rule_name(config: Config) -> str:
    """The name of the verification rule, which is looked up and so made known to the objectives."""
    name = config.rule or "sample_and_match"
    try:
        rule = get_rule(name)
        require_replayable(rule)
    except ValueError as error:
        raise ConfigError(f"rule: {error}") from error
    if config.drafter.mode not in rule.draft_modes:
        raise ConfigError(
            f"rule={name} needs drafter.mode={' or '.join(rule.draft_modes)}, got drafter.mode={config.drafter.mode}"
        )
    if name == "greedy" and config.temperature > 0:
        raise ConfigError(f"rule=greedy needs temperature=0, got {config.temperature:g}; set rule=null to sample")
    return name


def check_objectives(config: Config) -> None:
    """Find what is wrong with the objectives, alone and with the trees that the configuration asks for."""
    tree = shape(config)
    if not config.objectives:
        raise ConfigError("objectives is empty; name at least one, such as objectives=[{name: imitation}]")
    try:
        for settings in config.objectives:
            check_settings(settings).check_served(settings, tree)
    except ValueError as error:
        raise ConfigError(f"objectives: {error}") from error


def traffic(config: Config) -> list[Prompt]:
    """The prompts of the run, all read and checked."""
    source = config.traffic
    if source.path is not None:
        return read_jsonl(source.path, limit=source.limit, shuffle=source.shuffle, seed=config.seed)
    return generate(min(source.requests, source.limit or source.requests), seed=config.seed)


def check_context(config: Config, target: Target) -> None:
    """Raise ConfigError where slots are to be longer than the model's context."""
    context = context_length(target.parts.config)
    if context is not None and config.engine.max_length > context:
        raise ConfigError(
            f"engine.max_length={config.engine.max_length} exceeds the context of model {config.model!r}; "
            f"set engine.max_length={context} or less"
        )


def request_queue(config: Config, target: Target, prompts: Sequence[Prompt]) -> RequestQueue:
    """The run's requests, in order."""
    check_context(config, target)
    return RequestQueue(
        prompts,
        target.tokenizer,
        vocab_size=target.parts.config.vocab_size,
        max_new_tokens=config.max_new_tokens,
        max_length=config.engine.max_length,
        sampling=SamplingParams(config.temperature, config.top_k, config.top_p, config.seed),
    )


def drafter(config: Config, target: Target, prompts: list[list[int]]) -> Drafter:
    """The drafter that the run starts with, in float32 on the CPU.

    Args:
        config: names a checkpoint, or the architecture of an untrained drafter.
        target: the loaded target, before an engine has it.
        prompts: first prompts, for the draft vocabulary of an untrained drafter; may be empty.

    Raises:
        ConfigError: settings that do not fit, such as trees deeper than the drafter drafts.
        ValueError: a checkpoint that does not fit the target.
    """
    made = _made(config, target, prompts)
    if config.drafter.depth > made.max_depth:
        raise ConfigError(
            f"drafter.depth={config.drafter.depth} is more than the {made.max_depth} nodes that this drafter drafts "
            "one after the other; set it to that, or start a deeper drafter by drafter.options"
        )
    if made.formats:
        try:
            written(made, "sglang" if config.engine.name == "sglang" else None)
        except ValueError as error:  # which would come when it is first saved, after hours of learning
            raise ConfigError(f"drafter.name={config.drafter.name} cannot be saved: {error}") from error
    return made


def _made(config: Config, target: Target, prompts: list[list[int]]) -> Drafter:
    settings, made = config.drafter, _drafter_class(config)
    if settings.path is not None:
        return load_drafter(settings.path, target.parts, made, options=settings.options, made_for=settings.made_for)
    torch.manual_seed(config.seed)
    vocab = choose_draft_vocab(min(settings.vocab_size, len(target.parts.head)), token_prior(target.model, prompts))
    layers = tuple(settings.feature_layers) if settings.feature_layers else None
    try:
        started = made.from_target(target.parts, draft_vocab=vocab, feature_layers=layers, **settings.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"drafter.name={settings.name}: {error}") from error
    if not isinstance(started, Drafter):
        raise ConfigError(f"drafter.name={settings.name}: from_target gave {started!r} and no drafter")
    # What started it belongs to its checkpoint, also where its class does not say so.
    started.options = started.options or settings.options
    started.made_for = target.parts.fingerprint
    return started


def _drafter_class(config: Config) -> type[Drafter]:
    settings = config.drafter
    try:
        made = get_drafter(settings.name)
    except ValueError as error:
        raise ConfigError(f"drafter.name: {error}") from error
    try:
        made.check_options(settings.options)
    except ValueError as error:
        raise ConfigError(f"drafter.options: {error}") from error
    if settings.mode not in made.draft_modes:
        raise ConfigError(
            f"drafter.name={settings.name} drafts in mode {' or '.join(made.draft_modes)}, not drafter.mode="
            f"{settings.mode}; set drafter.name=eagle3 to draw its nodes"
        )
    if config.engine.name == "sglang" and made.sglang_algorithm is None:
        raise ConfigError(
            f"drafter.name={settings.name} is none that SGLang has; with engine.name=sglang set drafter.name=eagle3"
        )
    return made


def first_drafter(
    config: Config, target: Target, requests: RequestQueue, folder: Path | None
) -> tuple[Drafter, Config]:
    """The drafter that is served first, and the configuration of a learner that starts from the same one.

    Args:
        config: the run's.
        target: the loaded target.
        requests: its first prompts shape the draft vocabulary.
        folder: where to, for a learner of our own. None for one that is started apart: it does not know the prompts.
    """
    if folder is None or config.drafter.path is not None:
        return drafter(config, target, []), config
    made = drafter(config, target, requests.first_prompts(64))
    if not made.formats:
        return made, config
    save_drafter(made, folder)
    return made, replace(config, drafter=replace(config.drafter, path=str(folder)))


def handshake(parts: TargetParts, made: Drafter, name: str) -> Handshake:
    """What both halves of a run must agree on, ``name`` of the drafter's architecture included."""
    return Handshake(
        schema=SCHEMA,
        target=parts.digest,
        head_checksum=checksum(parts.head.tensors()),
        feature_layers=tuple(made.feature_layers),
        draft_map_checksum=checksum({"draft_vocab": made.draft_vocab}),
        drafter=name,
    )


def shape(config: Config) -> TreeShape:
    """The tree that the configuration asks for."""
    settings = config.drafter
    try:
        tree = TreeShape(settings.depth, settings.width, settings.num_nodes, settings.mode)
    except ValueError as error:
        raise ConfigError(f"drafter: {error}") from error
    engine = engine_class(config)
    if engine is not None and tree.most_nodes > engine.max_nodes:
        budget = "null" if settings.num_nodes is None else settings.num_nodes
        raise ConfigError(
            f"drafter.depth={settings.depth}, drafter.width={settings.width} and drafter.num_nodes={budget} make trees "
            f"of {tree.most_nodes} nodes, and the engine verifies {engine.max_nodes} at most; set drafter.num_nodes="
            f"{engine.max_nodes} or less"
        )
    return tree


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


def learner(config: Config, log: MetricsLog, run_dir: Path) -> Learner:
    """The training half of a run."""
    rule_name(config)
    _drafter_class(config)
    check_objectives(config)
    target = load(config)
    parts, device = target.parts, device_of(config)
    made = drafter(config, target, [])
    greeting = handshake(parts, made, config.drafter.name)
    made.to(device)
    # Of the target the head alone stays, as a copy: a view would keep the whole file of weights in memory. Autocast
    # multiplies it in bfloat16, whatever it is kept in.
    head = copy.deepcopy(parts.head)
    if dtype_of(config) != torch.bfloat16:
        head = head.float()
    del target, parts
    return_freed_memory(collect=True)
    scratch = copy.deepcopy(made).to(dtype_of(config)).eval().requires_grad_(False)

    def check_one(trajectory: TensorDictBase) -> None:
        validate(
            trajectory,
            vocab_size=len(head),
            hidden_size=head.weight.shape[1],
            feature_size=head.weight.shape[1] * len(made.feature_layers),
        )
        require_replayable(rule_of_code(int(trajectory["sampling", "rule"])))

    try:
        loss = SumLoss(make_objectives(config.objectives, made, head))
    except ValueError as error:
        raise ConfigError(f"objectives: {error}") from error
    settings = config.learner
    try:
        optimizers = drafter_optimizers(made, muon_lr=settings.muon_lr, adam_lr=settings.adam_lr)
    except ValueError as error:
        raise ConfigError(f"drafter.name={config.drafter.name}: {error}") from error
    try:
        recording = None if settings.record is None else TrajectoryDataset(settings.record, made.feature_layers)
    except ValueError as error:
        raise ConfigError(f"learner.record: {error}") from error
    with ExitStack() as opened:  # closed again if what follows fails
        with opening("wire.trajectories", config.wire.trajectories):
            collector = ZMQCollector(config.wire.trajectories, handshake=greeting, validate=check_one)
        opened.callback(collector.shutdown)
        with opening("wire.weights", config.wire.weights):
            publisher = WeightPublisher(config.wire.weights, handshake=greeting)
        opened.callback(publisher.close)
        result = Learner(
            drafter=made,
            loss=loss,
            optimizers=optimizers,
            buffer=trajectory_buffer(settings.buffer, settings.batch_size, config.seed),
            collector=collector,
            publisher=publisher,
            gate=Gate(config.gate.requests, config.gate.margin, shape(config), scratch),
            log=log,
            serving_dtype=dtype_of(config),
            batch_size=settings.batch_size,
            replay=settings.replay,
            publish_every=settings.publish_every,
            max_skipped=settings.max_skipped,
            checkpoint=run_dir / "learner",
            recording=recording,
        )
        if settings.resume is not None:
            result.resume(Path(settings.resume))
        opened.pop_all()
    return result

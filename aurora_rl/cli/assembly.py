"""The parts that both halves of a run need: the target, the requests and the first drafter of a spec."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.frozen import plain
from aurora_rl.cli.spec import RunSpec
from aurora_rl.collectors.keys import ClientKeys, ServerKeys
from aurora_rl.envs import Engine
from aurora_rl.models.loading import load_target
from aurora_rl.models.loading_parts import load_parts
from aurora_rl.models.target_head import context_length
from aurora_rl.policies import Drafter, TargetParts, token_prior
from aurora_rl.policies.adapters import check_size
from aurora_rl.policies.formats.files import load_drafter, local_folder, naming_drafters, save_drafter, written
from aurora_rl.policies.formats.peft import read_adapters
from aurora_rl.policies.registry import start_untrained
from aurora_rl.serving.requests import RequestQueue, prompt_tokens
from aurora_rl.workload.traffic import Prompt, generate_traffic, read_jsonl

Keys = TypeVar("Keys", ServerKeys, ClientKeys)
USUAL_LENGTH = 1024
"""Tokens of a slot, unless ``engine.max_length`` is set or the model's context is shorter."""
VOCAB_PROMPTS = 64  # first prompts, whose tokens choose the vocabulary of an untrained drafter


@dataclass(frozen=True, slots=True)
class LoadedTarget:
    """A loaded target, its tokenizer, and the copies of its parts that drafters use."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    parts: TargetParts


def load(spec: RunSpec) -> LoadedTarget:
    """Load the target."""
    with naming_drafters(spec.config.model, drafter_key="drafter.path"):
        model, tokenizer = load_target(spec.config.model, dtype=spec.dtype, device=spec.device)
    return LoadedTarget(model, tokenizer, TargetParts.of(model))


def load_alone(spec: RunSpec) -> TargetParts:
    """Load what drafters need of the target, for a process that does not run it."""
    with naming_drafters(spec.config.model, drafter_key="drafter.path"):
        return load_parts(spec.config.model, dtype=spec.dtype, device=spec.device)


def check_embedded(config: Config) -> None:
    """Raise ConfigError if the engine is a server of its own, for commands that run one in this process."""
    if config.engine.remote:
        raise ConfigError(
            f"engine.name={config.engine.name} is a server of its own, and this command runs the engine in this "
            "process; set engine.name=transformers"
        )


def engine_maker(spec: RunSpec) -> Callable[..., Engine]:
    """Return the class of the engine in this process, with its options: it is called as ``TransformersEngine`` is.

    Raises:
        ConfigError: The engine is a server of its own.
    """
    check_embedded(spec.config)
    assert spec.engine_class is not None
    # Engines of others need not have the option.
    return partial(spec.engine_class, **({"batch_invariant": True} if spec.config.engine.batch_invariant else {}))


def slot_length(config: Config, target: LoadedTarget) -> int:
    """Return the most tokens of a request: ``engine.max_length``, or what that is by default for this model.

    Raises:
        ConfigError: It is set, and exceeds the model's context.
    """
    context, length = context_length(target.parts.config), config.engine.max_length
    if length is None:
        return USUAL_LENGTH if context is None else min(USUAL_LENGTH, context)
    if context is not None and length > context:
        raise ConfigError(
            f"engine.max_length={length} exceeds the context of model {config.model!r}; "
            f"set engine.max_length={context} or less, or leave it out"
        )
    return length


def traffic(config: Config) -> list[Prompt]:
    """Return the prompts of the run, all read and checked."""
    source = config.traffic
    if source.path is not None:
        model = config.http.served_model_name or config.model
        return read_jsonl(source.path, limit=source.limit, shuffle=source.shuffle, seed=config.seed, model=model)
    with naming(f"traffic.requests={source.requests}"):
        return generate_traffic(min(source.requests, source.limit or source.requests), seed=config.seed)


def request_queue(spec: RunSpec, target: LoadedTarget, prompts: Sequence[Prompt]) -> RequestQueue:
    """Return the run's requests, in order."""
    return RequestQueue(
        prompts,
        target.tokenizer,
        vocab_size=target.parts.config.vocab_size,
        max_length=slot_length(spec.config, target),
        sampling_params=spec.sampling_params,
    )


def encoded_prompts(target: LoadedTarget, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return the token ids of prompts that nobody serves, for the day-0 draft vocabulary: without those that fail."""
    encoded = []
    for prompt in prompts:
        with suppress(ValueError):
            encoded.append(prompt_tokens(target.tokenizer, prompt.messages, target.parts.config.vocab_size))
    return encoded


def start_drafter(spec: RunSpec, target: LoadedTarget, prompts: list[list[int]], seed: int | None = None) -> Drafter:
    """Return the drafter that the run starts with, in float32 on the CPU.

    Args:
        spec: Names a checkpoint, or the architecture of an untrained drafter.
        target: The loaded target, before an engine has it.
        prompts: First prompts, for the draft vocabulary of an untrained drafter; may be empty.
        seed: Seed of an untrained drafter's weights; None takes the configuration's.

    Raises:
        ConfigError: Settings that do not fit, such as trees deeper than the drafter drafts.
        ValueError: A checkpoint that does not fit the target.
    """
    prior = token_prior(target.model, prompts) if prompts and spec.config.drafter.path is None else None
    return drafter_from_parts(spec, target.parts, prior, seed)


def drafter_from_parts(
    spec: RunSpec, parts: TargetParts, prior: Tensor | None = None, seed: int | None = None
) -> Drafter:
    """Return the drafter that a run starts with, as :func:`start_drafter` does, without running the target.

    ``prior`` has the expected counts of the target's tokens, ``[V]``, for the draft vocabulary; None without prompts.
    """
    settings = spec.config.drafter
    if settings.path is not None:
        drafter = load_checkpoint(spec, parts)
    else:
        torch.manual_seed(spec.config.seed if seed is None else seed)
        with naming(f"drafter.name={spec.drafter_name}", (TypeError, ValueError)):
            drafter = start_untrained(
                spec.drafter_class,
                parts,
                prior,
                vocab_size=settings.vocab_size,
                feature_layers=settings.feature_layers or None,
                options=plain(settings.options),
            )
    if settings.adapters:
        with naming(f"drafter.adapter_rank={settings.adapter_rank}"):
            check_size(drafter, settings.adapter_rank, spec.dtype)
        folder = None if settings.path is None else local_folder(settings.path)
        read_adapters(drafter, folder, settings.adapters, settings.adapter_rank)
    if spec.tree.depth > drafter.max_depth:
        raise ConfigError(
            f"drafter.depth={spec.tree.depth} is more than the {drafter.max_depth} nodes that this drafter drafts "
            "one after the other; set it to that, or start a deeper drafter by drafter.options"
        )
    if drafter.formats:
        with naming(f"drafter.name={spec.drafter_name} cannot be saved"):  # now, not after hours of learning
            written(drafter, spec.config.engine.name if spec.config.engine.remote else None)
    return drafter


def load_checkpoint(spec: RunSpec, parts: TargetParts, format: str | None = None) -> Drafter:
    """Load the drafter of ``drafter.path``; a format of None is that of run folders."""
    settings = spec.config.drafter
    assert settings.path is not None
    options, trained_for = plain(settings.options), settings.trained_for
    return load_drafter(
        settings.path, parts, spec.drafter_class, format=format, options=options, trained_for=trained_for
    )


def first_drafter(
    spec: RunSpec, target: LoadedTarget, prompts: list[list[int]], folder: Path | None
) -> tuple[Drafter, Config]:
    """Return the drafter that is served first, and the configuration of a learner that starts from it.

    It is saved to ``folder`` for a learner of our own. A learner that is started apart, for which ``folder`` is None,
    does not know the prompts.
    """
    config = spec.config
    if folder is None or config.drafter.path is not None:
        return start_drafter(spec, target, []), config
    drafter = start_drafter(spec, target, prompts)
    if not drafter.formats:
        return drafter, config
    save_drafter(drafter, folder)
    return drafter, replace(config, drafter=replace(config.drafter, path=str(folder.absolute())))


@contextmanager
def opening(key: str, address: str) -> Iterator[None]:
    """Make errors of an address name the key to set."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"{address} is in use; stop the process that holds it, or set {key} to another address on both sides"
            ) from error
        raise ConfigError(f"{key}: {error.strerror}") from error


def wire_keys(config: Config, read: Callable[[str], Keys]) -> Keys | None:
    """Return the keys that a function such as `learner_keys` reads from the folder ``wire.keys``; None without it."""
    with naming("wire.keys"):
        return None if config.wire.keys is None else read(config.wire.keys)

"""``aurora-rl check``: whether a model is served exactly, with what, and what it costs, before anything is started."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from aurora_rl import build
from aurora_rl.config import Config
from aurora_rl.envs import Request, TransformersEngine, generation_processors
from aurora_rl.envs.exactness import UnsupportedModelError
from aurora_rl.models import stop_token_ids
from aurora_rl.policies import Drafter, DrafterPolicy, TreeShape, available_drafters
from aurora_rl.server import measure_rounds

_MIB = 2**20


def check_model(config: Config, say: Callable[[str], Any] = print) -> bool:
    """Report on the configured model, line by line.

    Args:
        config: Names the model, its dtype and device, the engine's slots and length, and the drafter that is timed.
        say: Takes each line.

    Returns:
        Whether the embedded engine serves the model with the configured drafter.

    Raises:
        ModelError: The model cannot be loaded.
    """
    target = build.load(config)
    model = target.model
    weights = sum(p.nbytes for p in model.parameters()) / _MIB
    dtype = str(model.dtype).removeprefix("torch.")
    say(
        f"model        {config.model}: {type(model).__name__}, {dtype} on {model.device}, {weights:,.0f} MiB of weights"
    )
    served = _report_processors(config, target, say)
    drafters = _report_drafters(config, target, say)
    drafter = drafters.get(config.drafter.name)
    try:
        engine = TransformersEngine(
            model,
            num_slots=config.engine.slots,
            max_length=config.engine.max_length,
            feature_layers=drafter.feature_layers if drafter is not None else (),
        )
    except (UnsupportedModelError, ValueError) as error:
        say(f"engine       refused: {error}")
        return False
    found = engine.exactness
    for form, reason in found.switched_off.items():
        say(f"engine       {form} form switched off: {reason}")
    say(
        f"engine       exact in the {found.form} form: logits differ by {found.error:.1e} of their spread "
        f"({found.tolerance:.0e} is rounding)"
    )
    held = engine.cache_bytes / _MIB
    say(f"memory       {held:,.0f} MiB of keys and values for {engine.num_slots} slots of {engine.max_length} tokens")
    if drafter is None:
        return False
    _report_rounds(config, engine, drafter, say)
    return served


def _report_processors(config: Config, target: build.Target, say: Callable[[str], Any]) -> bool:
    if config.generation_config == "ignore":
        return True
    try:
        processors = generation_processors(target.model, stop_token_ids(target.model, target.tokenizer))
    except ValueError as error:
        say(f"generation   refused: {error}")
        return False
    if processors is not None:
        say("generation   the processors of generation_config are applied at every node")
    return True


def _report_drafters(config: Config, target: build.Target, say: Callable[[str], Any]) -> dict[str, Drafter]:
    """Start every drafter untrained; the configured one as it is configured."""
    started = {}
    for name in sorted({*available_drafters(), config.drafter.name}):
        settings = config.drafter
        if name != settings.name:
            settings = replace(settings, name=name, options={}, path=None, feature_layers=None)
        try:
            started[name] = drafter = build.drafter(replace(config, drafter=settings), target, [])
        except ValueError as error:
            say(f"drafter      {name} does not start: {error}")
            continue
        count = sum(p.numel() for p in drafter.parameters())
        say(f"drafter      {name} starts: {count / 1e6:.1f}M weights, reads layers {list(drafter.feature_layers)}")
    return started


def _report_rounds(config: Config, engine: TransformersEngine, drafter: Drafter, say: Callable[[str], Any]) -> None:
    shape = build.shape(config)
    served = (
        copy.deepcopy(drafter).to(device=engine.model.device, dtype=engine.model.dtype).eval().requires_grad_(False)
    )
    policy = DrafterPolicy(served, engine.store, num_nodes=shape.most_nodes, shape=shape)
    tokens = torch.arange(min(64, engine.max_length // 2)) % engine.vocab_size
    request = Request(0, tokens, engine.max_length - len(tokens))
    plain = TreeShape(0, mode=shape.mode)
    tree = f"{config.drafter.name} (depth {shape.depth}, width {shape.width})"
    for slots, seconds in sorted(measure_rounds(engine, policy, request, [plain, shape], repeats=5).items()):
        before, after = seconds[plain], seconds[shape]
        say(
            f"round        {slots} slot{'s' * (slots > 1)}: {before * 1e3:.1f} ms plain, {after * 1e3:.1f} ms with "
            f"{tree}, which pays from {after / before:.2f} tokens a round"
        )

"""``aurora-rl check``: whether a model is served exactly, with which drafters, and what a round costs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LogitsProcessorList

from aurora_rl.cli.arguments import add_config_arguments
from aurora_rl.cli.assembly import LoadedTarget, check_embedded, engine_maker, load, slot_length, start_drafter
from aurora_rl.cli.config import Config
from aurora_rl.cli.signals import Stop
from aurora_rl.cli.spec import RunSpec, resolve
from aurora_rl.envs import Engine, Request, TransformersEngine, generation_processors
from aurora_rl.models.loading import stop_token_ids
from aurora_rl.policies import DRAFTERS, Drafter, DrafterPolicy, TreeShape
from aurora_rl.policies.calibration import measure_rounds


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Report on the model. Returns the exit status: 1 if the engine does not serve it."""
    torch.set_num_threads(config.engine.threads)
    return 0 if check_model(config) else 1


def check_model(config: Config, say: Callable[[str], Any] = print) -> bool:
    """Report on the configured model, line by line; return whether the engine serves it with the drafter.

    Raises:
        ConfigError: The engine is a server of its own.
        ModelError: The model cannot be loaded.
    """
    check_embedded(config)  # before it is told that the usual drafter does not go with a server
    spec = resolve(config)
    new_engine = engine_maker(spec)
    target = load(spec)
    model, weights = target.model, _size(sum(p.nbytes for p in target.model.parameters()))
    dtype = str(spec.dtype).removeprefix("torch.")
    say(f"model        {config.model}: {type(model).__name__}, {dtype} on {model.device}, {weights} of weights")
    served, processors = True, None
    if config.generation_config != "ignore":
        try:
            processors = generation_processors(model, stop_token_ids(model, target.tokenizer))
            if processors is not None:
                processors(Request(0, torch.zeros(1, dtype=torch.int64), replace(spec.sampling_params, max_tokens=1)))
                say("generation   the processors of generation_config are applied at every node")
        except ValueError as error:
            served, processors = False, None
            say(f"generation   refused: {error}")
    drafters = _report_drafters(spec, target, say)
    drafter = drafters.get(spec.drafter_name)
    try:
        engine = new_engine(
            model,
            num_slots=config.engine.slots,
            max_length=slot_length(config, target),
            feature_layers=drafter.feature_layers if drafter is not None else (),
        )
    except ValueError as error:
        say(f"engine       refused: {error}")
        return False
    if isinstance(engine, TransformersEngine):
        _report_exactness(engine, say)
    else:
        say(f"engine       {config.engine.name} starts; aurora_rl.testing.check_engine tells whether it is exact")
    if drafter is None:
        return False
    _report_rounds(spec, engine, drafter, processors, say)
    return served


def _report_exactness(engine: TransformersEngine, say: Callable[[str], Any]) -> None:
    found = engine.exactness
    for form, reason in found.switched_off.items():
        say(f"engine       {form} form switched off: {reason}")
    say(
        f"engine       exact in the {found.form} form: logits differ by {found.error:.1e} of their spread "
        f"({found.tolerance:.0e} is rounding)"
    )
    slots = f"{engine.num_slots} slots of {engine.max_length} tokens"
    say(f"memory       {_size(engine.cache_bytes)} of keys and values for {slots}")


def _report_drafters(spec: RunSpec, target: LoadedTarget, say: Callable[[str], Any]) -> dict[str, Drafter]:
    """Start every drafter untrained; the configured one as it is configured."""
    started, config = {}, spec.config
    for name in sorted({*DRAFTERS, spec.drafter_name}):
        untrained = replace(config.drafter, name=name, options={}, path=None, feature_layers=None)
        try:
            its_spec = spec if name == spec.drafter_name else resolve(replace(config, drafter=untrained))
            started[name] = drafter = start_drafter(its_spec, target, [])
        except ValueError as error:
            say(f"drafter      {name} does not start: {error}")
            continue
        count = _short(sum(p.numel() for p in drafter.parameters()), 1000, ("", "k", "M", "G"))
        say(f"drafter      {name} starts: {count} weights, reads layers {list(drafter.feature_layers)}")
    return started


def _report_rounds(
    spec: RunSpec,
    engine: Engine,
    drafter: Drafter,
    processors: Callable[[Request], LogitsProcessorList] | None,
    say: Callable[[str], Any],
) -> None:
    shape = spec.tree
    served = drafter.serving_copy(spec.dtype, spec.device)
    policy = DrafterPolicy(served, engine.store, num_nodes=shape.num_nodes, shape=shape)
    tokens = torch.arange(min(64, engine.max_length // 2)) % engine.vocab_size
    request = Request(0, tokens, replace(spec.sampling_params, max_tokens=engine.max_length - len(tokens)))
    plain = TreeShape(0, mode=shape.mode)
    tree = f"{spec.drafter_name} (depth {shape.depth}, width {shape.width})"
    costs = measure_rounds(engine, policy, request, [plain, shape], repeats=5, processors=processors)
    for slots, seconds in sorted(costs.items()):
        before, after = seconds[plain], seconds[shape]
        say(
            f"round        {slots} slot{'s' * (slots > 1)}: {before * 1e3:.1f} ms plain, {after * 1e3:.1f} ms with "
            f"{tree}, which pays from {after / before:.2f} tokens a round"
        )
    if len(costs) > 1:
        say("round        times never fall with more slots: a faster round of more slots counts for fewer slots too")


def _size(count: int) -> str:
    return _short(count, 1024, (" bytes", " KiB", " MiB", " GiB"))


def _short(count: int, step: int, units: Sequence[str]) -> str:
    """Format a count in the largest unit that it has one of: 9.5k, 135M."""
    power = max(i for i in range(len(units)) if count >= step**i or not i)
    value = count / step**power
    return f"{value:.{int(power > 0 and value < 10)}f}{units[power]}"

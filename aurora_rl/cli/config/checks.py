"""Checks of a configuration's values, each alone and together."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from operator import attrgetter
from typing import Any

from omegaconf import DictConfig

from aurora_rl.addresses import is_local
from aurora_rl.cli.arguments import as_pair
from aurora_rl.cli.config.canary import check_trials
from aurora_rl.cli.config.fleet import check_fleet
from aurora_rl.cli.config.privacy import check_privacy
from aurora_rl.cli.config.schema import Config
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.frozen import plain
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.telemetry.loggers import LOGGERS
from aurora_rl.tenants import check_adapters

_POSITIVE = """
    engine.slots http.max_body http.max_waiting drafter.vocab_size
    drafter.depth drafter.width drafter.adapter_rank
    baseline.window wire.queue wire.queue_bytes learner.batch_size learner.buffer learner.buffer_bytes
    learner.max_skipped learner.publish_every checkpoint.keep gate.requests canary.requests traffic.requests
"""

_ADDRESS = re.compile(r"tcp://[^\s/]+:\d+|ipc://.+").fullmatch

_RULES: dict[str, tuple[str, Callable[[Any], object]]] = {
    **dict.fromkeys(_POSITIVE.split(), ("be at least 1", lambda value: value >= 1)),
    **dict.fromkeys(
        ("traffic.limit", "max_new_tokens", "engine.part_tokens"),
        ("be at least 1 or null", lambda value: value is None or value >= 1),
    ),
    **dict.fromkeys(("canary.share", "canary.engines"), ("lie in [0, 0.5]", lambda value: 0 <= value <= 0.5)),
    "canary.window": ("be at least 2, as the first round of a window is not measured", lambda value: value >= 2),
    **dict.fromkeys(("canary.false_alarm_rate", "canary.margin"), ("lie between 0 and 1", lambda value: 0 < value < 1)),
    "baseline.share": ("lie in [0, 1)", lambda value: 0 <= value < 1),
    "engine.capture_rate": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    **dict.fromkeys(
        ("wire.max_message", "telemetry.max_log"), ("be at least 65536 bytes", lambda value: value >= 1 << 16)
    ),
    # More hang: each thread has a stack, and every operation waits for all of them.
    **dict.fromkeys(("engine.threads", "learner.threads"), ("lie in 1..1024", lambda value: 1 <= value <= 1024)),
    "engine.max_length": (
        "be at least 2, for a prompt and an answer, or null",
        lambda value: value is None or value >= 2,
    ),
    "temperature": ("be a finite number of at least 0", lambda value: 0 <= value < math.inf),
    "top_k": ("be at least -1", lambda value: value >= -1),
    "top_p": ("be above 0 and at most 1", lambda value: 0 < value <= 1),
    "min_p": ("lie in [0, 1]", lambda value: 0 <= value <= 1),
    "http.host": ("not be empty", bool),
    "http.port": ("lie in 0..65535 or be null", lambda value: value is None or 0 <= value <= 65535),
    "http.timeout": ("be a number of seconds above 0", lambda value: 0 < value < math.inf),
    "http.cors_origins": (
        "be like https://chat.example, without a path",
        lambda value: all(re.fullmatch(r"\*|https?://[^/\s]+", origin) for origin in value),
    ),
    "learner.nice": ("lie in 0..19", lambda value: 0 <= value <= 19),
    **dict.fromkeys(
        ("learner.muon_lr", "learner.adam_lr", "learner.replay"),
        ("not be negative", lambda value: 0 <= value < math.inf),
    ),
    **dict.fromkeys(
        ("engine.prefix_cache_tokens", "drafter.history", "learner.keep"), ("not be negative", lambda value: value >= 0)
    ),
    "drafter.lookup": ("not be negative", lambda value: value is None or value >= 0),
    "drafter.trained_for": ("be target or any", ("target", "any").__contains__),
    "dtype": (
        "be auto, float32, bfloat16, float16 or float64",
        ("auto", "float32", "bfloat16", "float16", "float64").__contains__,
    ),
    "generation_config": ("be auto or ignore", ("auto", "ignore").__contains__),
    "learner.parallel": ("be ddp, fsdp or null", (None, "ddp", "fsdp").__contains__),
    "telemetry.logger": (f"be {', '.join(LOGGERS)} or null", (None, *LOGGERS).__contains__),
    **dict.fromkeys(("wire.trajectories", "wire.weights"), ("be tcp://host:port or ipc://path", _ADDRESS)),
    "engine.plugin_address": ("be tcp://host:port, ipc://path or null", lambda value: value is None or _ADDRESS(value)),
}
"""What the value of a key must do, and whether it does."""


def without_extras(merged: DictConfig, named: Collection[str]) -> None:
    """Turn off what vLLM does without, unless it was named: then it is refused."""
    if merged.engine.name != "vllm":
        return
    if "drafter.width" not in named:  # it drafts chains
        merged.drafter.width = 1
    if "http.port" not in named:  # clients ask it themselves
        merged.http.port = None


def check_config(config: Config) -> None:
    """Raise ConfigError if a value is out of range, or two do not go together."""
    learner = config.learner
    for key, (duty, holds) in _RULES.items():
        value = attrgetter(key)(config)
        if not holds(value):
            raise ConfigError(f"{key} must {duty}, got {plain(value)!r}")
    if config.traffic.path == "":
        raise ConfigError("traffic.path is empty; name a file, or null")
    if learner.buffer < learner.batch_size:
        raise ConfigError(
            f"learner.buffer={learner.buffer} is less than learner.batch_size={learner.batch_size}, so that no step "
            f"would ever be taken; set learner.buffer={learner.batch_size} or more"
        )
    check_drafter_config(config)
    _check_engine(config)
    check_trials(config)
    _check_wire(config)
    check_privacy(config)
    check_fleet(config)


def check_drafter_config(config: Config) -> None:
    """Raise ConfigError if values of ``drafter`` do not go together, or not with the engine."""
    drafter, options = config.drafter, config.drafter.options
    old = [name for name in ("learned", "lookup", "learned_options", "min_depth") if name in options]
    if drafter.name == "hybrid" or (drafter.name is None and old):
        was = "drafter.name=hybrid" if drafter.name else f"drafter.options.{old[0]} of the drafter hybrid"
        now = f"drafter.name={options.get('learned', 'medusa')} drafter.lookup={options.get('lookup', 2)}"
        raise ConfigError(f"{was} is {now} now, and its learned_options are drafter.options")
    layers = list(drafter.feature_layers or ())
    if sorted(set(layers)) != layers:
        raise ConfigError(f"drafter.feature_layers must rise, as engines join states in that order, got {layers}")
    if not drafter.adapters:
        return
    named, engine = f"drafter.adapters={list(drafter.adapters)}", config.engine.name
    if config.engine.remote:
        raise ConfigError(
            f"{named}: {REMOTE_ENGINES[engine]} keeps one drafter for all requests; leave the key out, or set "
            "engine.name=transformers"
        )
    if config.compare:
        raise ConfigError(f"{named} next to compare={list(config.compare)}: leave one of them out")
    with naming("drafter.adapters"):
        check_adapters(drafter.adapters)


def _check_wire(config: Config) -> None:
    wire = config.wire
    addresses = {"wire.trajectories": wire.trajectories, "wire.weights": wire.weights}
    if config.engine.plugin_address is not None:
        addresses["engine.plugin_address"] = config.engine.plugin_address
    for key, address in addresses.items():
        if address.startswith("tcp://") and int(address.rpartition(":")[2]) > 65535:
            raise ConfigError(f"{key}={address}: a port lies in 1..65535")
    if wire.trajectories == wire.weights:
        raise ConfigError(f"wire.trajectories and wire.weights must differ, both are {wire.weights!r}")
    for key, address in addresses.items():
        if wire.keys is None and address.startswith("tcp://") and not is_local(address):
            raise ConfigError(
                f"{key}={address}: other hosts can reach it, which needs keys; make them with `aurora-rl keys FOLDER` "
                "and set wire.keys=FOLDER on both sides, or take an address of this host, such as tcp://127.0.0.1:5557"
            )


def _check_engine(config: Config) -> None:
    engine = config.engine
    if engine.batch_invariant and engine.name != "transformers":
        raise ConfigError(
            f"engine.batch_invariant=true needs engine.name=transformers, got {engine.name!r}; leave it out"
            + (", and set engine.arguments=[--enable-deterministic-inference]" if engine.name == "sglang" else "")
        )
    if not engine.remote:
        return
    if config.rule is not None:
        raise ConfigError(
            f"engine.name={engine.name} verifies by a rule of its own, got rule={config.rule}; set rule=null"
        )
    if (engine.url is None) != (engine.plugin_address is None):
        pairs = [as_pair(f"engine.{key}", getattr(engine, key)) for key in ("url", "plugin_address")]
        raise ConfigError(
            f"{' and '.join(pairs)} go together; set both, to a running server and the address of its plugin"
        )
    if engine.url is not None and config.drafter.path is None:
        raise ConfigError("engine.url attaches to a running server; set drafter.path to the drafter that it serves")
    if config.drafter.mode != "topk":
        raise ConfigError(
            f"engine.name={engine.name} drafts likeliest tokens, got drafter.mode={config.drafter.mode}; set "
            "drafter.mode=topk"
        )
    if engine.name == "vllm" and engine.url is None and config.drafter.width != 1:
        raise ConfigError(
            f"engine.name=vllm drafts chains, got drafter.width={config.drafter.width}; set drafter.width=1"
        )
    if engine.name == "vllm" and config.http.port is not None:
        raise ConfigError(
            f"http.port={config.http.port}: there is no front before vLLM, whose own port clients ask; leave it out"
        )

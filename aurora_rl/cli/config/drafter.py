"""The configuration of the drafter, and checks of its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.tenants import check_adapters

if TYPE_CHECKING:
    from aurora_rl.cli.config import Config


@dataclass(frozen=True)
class DrafterConfig:
    """The drafter and the trees that it proposes."""

    name: str | None = None
    """An architecture (one of ``list(aurora_rl.policies.DRAFTERS)``), or package.module:Class; null takes that of the
    checkpoint in ``drafter.path``, or medusa."""
    options: dict[str, Any] = field(default_factory=dict)
    """Architecture-specific options, for example ``fc_norm: true``."""
    path: str | None = None
    """A drafter checkpoint to start from, a folder or hub id; null starts untrained."""
    trained_for: str = "target"
    """Weights that a checkpoint must be trained for: target takes those of the target alone, any takes all."""
    vocab_size: int = 8192
    """Rows of the draft head."""
    feature_layers: tuple[int, ...] | None = None
    """Target layers that make the features; null takes the architecture's default."""
    depth: int = 4
    """Longest path."""
    width: int = 4
    """Most children of a node: 1 drafts a chain, more a top-k tree. 1 with engine.name=vllm."""
    num_nodes: int | None = 4
    """Most nodes of a tree; null keeps all."""
    lookup: int | None = None
    """Most nodes that are looked up in the request's text and in earlier answers. They are merged into each tree or
    verified in its place. 0 turns it off. null is 8, or 0 where lookup cannot be had: SGLang, vLLM, sampled trees,
    drafter.name=ngram."""
    history: int = 65536
    """Most tokens of earlier answers kept for lookup. A request searches answers of its own cache_salt only. 0 keeps
    none: lookup then searches the request's own text alone. Requests with learn=false leave nothing in it."""
    mode: str = "topk"
    """Choice of nodes: topk takes the likeliest; sampled and sampled_without_replacement draw, for policy gradients."""
    adaptive: bool = True
    """Choose depth, chain or tree, or no speculation by measured acceptance and costs; false keeps one shape."""
    adapters: tuple[str, ...] = ()
    """Tenants with a drafter of their own: a small delta (LoRA) on the shared one, which drafts for requests of this
    tenant and learns from them alone. For the embedded engine, with eagle3 or eagle."""
    adapter_rank: int = 8
    """Rank of these deltas. One has at most 20 MB."""


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

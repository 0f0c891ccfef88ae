"""Configuration of the commands: one dataclass per part, read by OmegaConf from a file and ``key=value`` pairs.

Constructors elsewhere take flat arguments and never see these classes. Nothing of a :class:`Config` can be changed: its
lists are tuples, and its mappings are read-only. ``dataclasses.replace`` makes another.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from aurora_rl.cli.config_canary import CanaryConfig, without_trials
from aurora_rl.cli.config_checks import check_config, without_extras
from aurora_rl.cli.config_drafter import DrafterConfig
from aurora_rl.cli.config_fleet import FleetConfig
from aurora_rl.cli.config_privacy import PrivacyConfig, keep_nothing
from aurora_rl.cli.config_tree import MOST_SHOWN, keys_of, nested, node_at, wrong_type
from aurora_rl.cli.cpus import usable_cpus
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.frozen import frozen, plain
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.settings import nearest


@dataclass(frozen=True)
class EngineConfig:
    """The serving engine.

    "transformers" serves in this process. "sglang" and "vllm" are servers, launched here if ``url`` is null. Their
    trees keep one shape, and ``drafter.adaptive`` and ``baseline`` do not reach them: ``speedup`` is null.
    """

    name: str = "transformers"
    """Engine: transformers, sglang, vllm, or package.module:Class of one in this process."""
    slots: int = 2
    """Requests decoded at the same time."""
    max_length: int = 1024
    """Most tokens of a request, prompt and completion together."""
    prefix_cache_tokens: int = 8192
    """Tokens of finished requests whose keys and values the embedded engine keeps; 0 keeps none. They serve prompts
    that begin alike and have the same cache_salt, such as a chat's next turn. SGLang and vLLM have caches of their
    own."""
    threads: int = field(default_factory=lambda: max(min(usable_cpus(), 9) - 1, 1))
    """CPU threads of the inference server; by default one of the process's CPUs is left to the learner."""
    url: str | None = None
    """URL of a running SGLang or vLLM to attach to, started on the drafter of ``drafter.path``; null launches one.
    Model and dtype, unless they are set, and lengths and the trees' shape are the server's."""
    plugin_address: str | None = None
    """Address of that server's plugin: AURORA_RL_SGLANG or AURORA_RL_VLLM in its environment."""
    arguments: tuple[str, ...] = ()
    """More arguments of ``sglang.launch_server``, or of ``vllm serve``."""
    capture_rate: float = 1.0
    """Share of the requests that are captured: that go to the learner, and whose answers lookup searches."""
    batch_invariant: bool = False
    """Compute a token's logits to the same bits whatever else is in the pass, so that speculative text is plain text in
    bfloat16 too. It takes time (docs/batch_invariance.md). For the embedded engine. SGLang has an option of its own,
    ``engine.arguments=[--enable-deterministic-inference]``; for vLLM set VLLM_BATCH_INVARIANT in its environment."""

    @property
    def attaches(self) -> bool:
        """Whether the engine is a server of its own that runs already."""
        return self.remote and self.url is not None

    @property
    def remote(self) -> bool:
        """Whether the engine is a server of its own."""
        return self.name in REMOTE_ENGINES


@dataclass(frozen=True)
class TrafficConfig:
    """Where requests come from."""

    path: str | None = None
    """JSONL file; null takes the built-in generator."""
    limit: int | None = None
    """Most requests; null is the whole file, or ``requests`` of the generator."""
    shuffle: bool = False
    """Serve the file's requests in random order."""
    requests: int = 300
    """Requests that the built-in generator makes."""


@dataclass(frozen=True)
class BaselineConfig:
    """Windows of plain decoding that speculation is compared with."""

    share: float = 0.05
    """Share of decode time; 0 turns the windows off."""
    window: int = 32
    """Rounds of a window."""


@dataclass(frozen=True)
class WireConfig:
    """ZeroMQ addresses, bound by the learner."""

    trajectories: str = "tcp://127.0.0.1:5557"
    """Address that receives trajectories: tcp://host:port or ipc://path."""
    weights: str = "tcp://127.0.0.1:5558"
    """Address that hands out weights."""
    queue: int = 256
    """Trajectories that wait for an absent learner before the oldest is dropped."""
    queue_bytes: int = 536870912
    """Most bytes of them."""
    max_message: int = 1073741824
    """Most bytes of a trajectory, and of a drafter's weights, on the wire; the same on both sides."""
    keys: str | None = None
    """Folder of CurveZMQ keys, as ``aurora-rl keys`` makes it. Addresses that other hosts can reach need keys, those of
    this host do not. An engine takes its folder from AURORA_RL_SGLANG_KEYS or AURORA_RL_VLLM_KEYS."""


@dataclass(frozen=True)
class HttpConfig:
    """The server of OpenAI's API; it needs ``pip install 'aurora-rl[serve]'``."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every address of this machine."""
    port: int | None = 8000
    """Port to listen at; 0 takes a free one. With engine.name=sglang requests go on to SGLang; vLLM refuses it.
    null opens none, which leaves clients to the engine's own port, or the flywheel to its traffic; `sglang attach`
    listens if it is set."""
    api_keys: str | None = None
    """File with the keys that open the server, one a line; null takes the environment variable AURORA_RL_API_KEYS, and
    without that everyone is let in."""
    served_model_name: str | None = None
    """Name of the model that clients and lines of traffic ask for; null takes ``model``. SGLang and vLLM have their own
    option, ``engine.arguments=[--served-model-name, NAME]``."""
    max_body: int = 1048576
    """Most bytes of a request's body."""
    max_waiting: int = 256
    """Requests that may wait for a slot; the next are answered with status 429."""
    timeout: float = 600.0
    """Most seconds of a request, waiting included."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call the server from a browser, such as https://chat.example; * is any."""


@dataclass(frozen=True)
class LearnerConfig:
    """The training server."""

    spawn: bool = True
    """Whether the server starts a learner of its own; false leaves that to one at ``wire.*``, or to none."""
    threads: int = 1
    """CPU threads of the learner."""
    nice: int = 19
    """Scheduling priority of the process, 0 to 19: at 19 it takes the CPU time that serving leaves."""
    batch_size: int = 4
    """Requests of an optimizer step."""
    replay: int = 10
    """Most replayed batches for each batch of new requests. They are taken while no new request waits."""
    buffer: int = 2000
    """Requests kept for replay."""
    buffer_bytes: int = 4294967296
    """Most bytes of them. Beyond either bound the oldest goes first, of the engine that has most."""
    muon_lr: float = 0.02
    """Learning rate of the matrices (Muon)."""
    adam_lr: float = 5e-4
    """Learning rate of everything else, the draft head included (AdamW)."""
    publish_every: int = 8
    """New requests between two candidates."""
    max_skipped: int = 20
    """Steps in a row whose loss or gradient is not finite before the learner stops."""
    keep: int = 5
    """Published drafters that are kept in ``versions`` of the run's folder, the newest; those that were rolled back are
    removed."""
    parallel: str | None = None
    """How the processes that torchrun starts share the steps of `aurora-rl learn`. ddp has all weights on each, fsdp a
    shard of weights and optimizer states; null is for one process."""
    resume: str | None = None
    """Training state to continue."""
    record: str | None = None
    """Folder to write every trajectory to that arrives; null keeps none."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Training states, from which a learner goes on."""

    keep: int = 3
    """States that are kept, the newest."""
    buffer: bool = False
    """Save the replay buffer too, so that a learner goes on exactly as if it had not stopped. It has users' text."""


@dataclass(frozen=True)
class GateConfig:
    """Test of a candidate, by replay, before it is served."""

    requests: int = 8
    """Arrivals held back for each decision."""
    margin: float = 0.02
    """Loss of acceptance length that is tolerated: publish if the mean paired difference is above minus this."""


@dataclass(frozen=True)
class TelemetryConfig:
    """Where the figures of a run go, next to its ``metrics.jsonl``."""

    logger: str | None = None
    """TorchRL's logger of the figures: csv, tensorboard, wandb or mlflow, into ``logs`` in the run's folder; null for
    none. All but csv are packages of their own."""
    max_log: int = 268435456
    """Most bytes of ``metrics.jsonl``. Once it has so many it replaces ``metrics.1.jsonl``, and is begun anew."""


@dataclass(frozen=True)
class Config:
    """Everything that a run is made of."""

    model: str = "smollm2"
    """Embedded model by name, hub id or folder of a Hugging Face causal LM."""
    device: str = "auto"
    """Device: cpu, cuda or cuda:1; auto takes a GPU if there is one."""
    dtype: str = "auto"
    """Dtype: float32, bfloat16, float16 or float64; auto is bfloat16 if the hardware has it."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    http: HttpConfig = field(default_factory=HttpConfig)
    traffic: TrafficConfig = field(default_factory=TrafficConfig)
    max_new_tokens: int | None = None
    """Most tokens of a completion whose request names no budget. null is 96 for traffic. For clients it is what the
    context leaves, and 16 at /v1/completions."""
    temperature: float = 0.0
    """Sampling temperature; 0 decodes greedily."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0 or -1 takes all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens of this total probability, of what min_p and top_k leave."""
    min_p: float = 0.0
    """Sample from tokens whose probability is at least this share of the largest; 0 takes all."""
    rule: str | None = None
    """Verification rule by name, or package.module:Class; null takes sample_and_match, which is greedy at temperature
    0. A rule whose text depends on what was drafted is refused, since the gate could not replay it."""
    generation_config: str = "auto"
    """Logits processors: auto applies those of the model's generation config, such as repetition_penalty; ignore serves
    raw logits. Temperature, top-k, top-p, min-p and the token budget are those above in either case."""
    seed: int = 0
    """Seed of traffic, sampling and learning."""
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    wire: WireConfig = field(default_factory=WireConfig)
    objectives: tuple[dict[str, Any], ...] = field(default_factory=lambda: ({"name": "imitation"},))
    """Name and settings of each objective; their losses are summed."""
    learner: LearnerConfig = field(default_factory=LearnerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    canary: CanaryConfig = field(default_factory=CanaryConfig)
    compare: tuple[str, ...] = ()
    """Two drafters to compare on live traffic, ``[a, b]``: each a folder, a hub id, or a name as of ``drafter.name``.
    They draft in turns as ``canary`` says, a in place of the served weights and b in place of the new ones. Nobody
    learns. Empty compares none."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    run_dir: str | None = None
    """New or empty folder of the run; null is ``runs/<time>``."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, frozen(value))


_MOVED = {"control": "baseline", "drafter.made_for": "drafter.trained_for", "engine.control": "engine.plugin_address"}


def load_config(path: str | Path | None = None, overrides: Sequence[str] = (), usual: Sequence[str] = ()) -> Config:
    """Merge the defaults, then a YAML file, then ``key=value`` pairs.

    Args:
        path: YAML file with any of the keys.
        overrides: Pairs such as ``engine.slots=2``.
        usual: Pairs that take the place of defaults.

    Raises:
        ConfigError: The file cannot be read, a key is unknown (the nearest known key is named) or a value is of the
            wrong type or out of range.

    Example:
        >>> load_config(overrides=["engine.slots=2"]).engine.slots
        2
    """
    merged = _schema()
    sources = [(pair, _from_pair(pair, merged)) for pair in usual]
    if path is not None:
        try:
            text = Path(path).read_text(encoding="utf-8")
            # OmegaConf takes a text for one key, such as the whole of a file that is no YAML.
            maps = isinstance(yaml.compose(text), yaml.MappingNode | None)
            loaded = OmegaConf.load(io.StringIO(text)) if maps else None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
        except Exception as error:  # the YAML parser has its own hierarchy of errors
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if not isinstance(loaded, DictConfig):
            raise ConfigError(
                f"{path} holds no mapping of keys, but {text.strip()[:MOST_SHOWN]!r}; write lines such as "
                "model: smollm2, or name another file"
            )
        sources.append((str(path), loaded))
    for pair in overrides:
        if "=" not in pair:
            raise ConfigError(f"expected key=value, got {pair!r}; for example engine.slots=2")
        sources.append((pair, _from_pair(pair, merged)))
    known = keys_of(merged)
    for source, values in sources:
        for key in keys_of(values):
            if (now := _moved(key)) is not None:
                raise ConfigError(f"{key!r} in {source} is called {now!r} now")
            if key not in known:
                near = nearest_key(key)
                if near == f"{key}.name":  # drafter=eagle3
                    near += f"={OmegaConf.select(values, key)}"
                raise ConfigError(f"unknown key {key[:MOST_SHOWN]!r} in {source}; did you mean {near!r}?")
            node = node_at(values, key)
            if node is not None and node._value() == "???":  # OmegaConf would leave the default without a word
                raise ConfigError(f"{key}=??? in {source}: ??? stands for no value; name one, or leave the key out")
        try:
            merged.merge_with(values)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list in the place of a mapping
            if told := wrong_type(values, merged):
                raise ConfigError(told if source in overrides else f"{source}: {told}") from error
            raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
        if told := nested(values, merged):
            raise ConfigError(told if source in overrides else f"{source}: {told}")
    try:
        named = {key for _, values in sources[len(usual) :] for key in keys_of(values)}  # by the user
        for settle in (keep_nothing, without_trials, without_extras):
            settle(merged, named)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(str(error).replace("\n", " ")) from error
    assert isinstance(config, Config)
    check_config(config)
    return config


def _moved(key: str) -> str | None:
    """Return the new name of a key if it, or a key above it, was renamed."""
    return next((now + key[len(was) :] for was, now in _MOVED.items() if key == was or key.startswith(f"{was}.")), None)


def nearest_key(name: str) -> str:
    """Return the configuration key that a user most likely meant by ``name``.

    Example:
        >>> nearest_key("slots"), nearest_key("drafter"), nearest_key("engine.slot")
        ('engine.slots', 'drafter.name', 'engine.slots')
    """
    known = keys_of(_schema())
    if f"{name}.name" in known:
        return f"{name}.name"
    last = [key for key in known if key.rpartition(".")[2] == name]
    return last[0] if last else nearest(name, known)


def _from_pair(pair: str, config: DictConfig) -> DictConfig:
    """Read ``key=value``: a string key takes the text, with ``${key}`` replaced, any other key takes YAML."""
    key, _, text = pair.partition("=")
    node = node_at(config, key)
    if isinstance(node, StringNode) and not (text == "null" and node._is_optional()):
        known = keys_of(config)
        # What is left of ${ has other meanings to OmegaConf, and written to a run's configuration would get them there.
        rest = re.sub(r"(?<!\\)\$\{([\w.]+)\}", lambda found: "" if found[1] in known else found[0], text)
        if "${" in rest:
            raise ConfigError(
                f"{pair}: ${{ begins the name of a key, such as ${{model}}, got {rest[rest.index('${') :]!r}"
            )
        values = OmegaConf.create({})
        OmegaConf.update(values, key, text)
        return values
    try:
        return OmegaConf.from_dotlist([pair])
    except Exception as error:  # the YAML parser has its own hierarchy of errors
        raise ConfigError(f"{pair}: not a valid value: {str(error).splitlines()[0]}") from error


def _schema() -> DictConfig:
    """Return the defaults as a tree that takes values: OmegaConf makes that of a frozen dataclass read-only."""
    tree = OmegaConf.structured(Config)
    for part in (tree, *tree.values()):
        if isinstance(part, DictConfig):
            OmegaConf.set_readonly(part, None)
    return tree


def to_yaml(config: Config, *, run_dir: bool = True) -> str:
    """Return the configuration as YAML that :func:`load_config` reads back.

    Args:
        config: The configuration.
        run_dir: False leaves ``run_dir`` out, so that a run's saved configuration starts another run elsewhere.
    """
    tree = plain(config)
    if not run_dir:
        del tree["run_dir"]
    return OmegaConf.to_yaml(OmegaConf.create(tree))

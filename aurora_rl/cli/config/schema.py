"""Every configuration key: one dataclass per section.

Constructors elsewhere take flat arguments and never see these classes. Nothing of a :class:`Config` can be changed: its
lists are tuples, and its mappings are read-only. ``dataclasses.replace`` makes another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aurora_rl.cli.cpus import usable_cpus
from aurora_rl.cli.frozen import frozen
from aurora_rl.remote_engines import REMOTE_ENGINES


@dataclass(frozen=True)
class EngineConfig:
    """The serving engine.

    "transformers" serves in this process. "sglang" and "vllm" are servers, launched here if ``url`` is null. Their
    trees keep one shape, and ``drafter.adaptive`` and ``baseline`` do not reach them: ``speedup`` is null.
    """

    name: str = "transformers"
    """Engine: transformers, sglang, vllm, or package.module:Class of one in this process."""
    slots: int = 2
    """Requests decoded at the same time; Python calls it ``num_slots``."""
    max_length: int | None = None
    """Most tokens of a request, prompt and completion together; null is 1024, or the model's context where that is
    less."""
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
    part_tokens: int | None = 256
    """Tokens of an answer after which what is written of it goes to the learner, while it goes on; null sends requests
    when they have ended."""
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
    vocab_follows: bool | None = None
    """Whether the draft vocabulary follows the traffic: tokens that answers say most often take the rows of those that
    they say least. null does so with an engine in this process, where the drafter and the other settings allow it."""
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
    """Origins whose pages may call the server from a browser, such as https://chat.example; ["*"] is any."""


@dataclass(frozen=True)
class LearnerConfig:
    """The learner, which trains the drafter while the server serves."""

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
    recording: str | None = None
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
class CanaryConfig:
    """How weights that passed the gate are tried before they draft every round.

    An embedded engine tries them in a share of its rounds. A learner of several engines, of any kind, may try them at a
    share of the engines first.
    """

    share: float = 0.5
    """Share of the rounds that new weights draft during their trial. 0 swaps them in at once, which is the default of
    `aurora-rl flywheel` without ``compare``, and all that SGLang and vLLM do."""
    window: int = 8
    """Rounds of a window. A window of the new weights is compared with one of the old weights next to it."""
    false_alarm_rate: float = 0.01
    """Chance that weights as good as the old ones are rolled back, at most."""
    margin: float = 0.05
    """Relative loss of acceptance length or of throughput that is tolerated: weights are promoted once a larger one is
    ruled out."""
    max_rounds: int | None = 512
    """Rounds that new weights draft before they are promoted if no loss was proven; null tries them until a loss is
    proven or ruled out."""
    engines: float = 0.0
    """Share of the engines that get new weights first, if several are connected to the learner; at least one does. 0
    gives them to all engines at once. For the learner, which compares at ``false_alarm_rate`` and ``margin`` too."""
    requests: int = 8
    """Requests per engine in a window of the trial at a share of the engines, on average over a group of them."""
    max_requests: int | None = 256
    """Requests with new weights, per engine that has them at a time, before all engines get them if no loss was proven.
    null tries them until a loss is proven or ruled out."""


@dataclass(frozen=True)
class PrivacyConfig:
    """Capture and retention of users' texts (docs/privacy.md). Server and learner need the same values."""

    opt_out: tuple[str, ...] = ()
    """Tenants whose requests are never captured, by their names in the header X-Aurora-Tenant."""
    max_age: float | None = None
    """Seconds from the end of a request after which its trajectory is dropped. It is dropped wherever it waits: in the
    server's queue, the replay buffer or the gate. null keeps it until a newer one takes its place."""
    zero_retention: bool = False
    """Drop each trajectory after its gradient step, keep no answers, rows or texts of ended requests for others, and
    write no text to disk. ``learner.replay``, ``drafter.history`` and ``engine.prefix_cache_tokens`` are 0, and
    recordings are refused. For the embedded engine."""


@dataclass(frozen=True)
class TelemetryConfig:
    """Where the figures of a run go, next to its ``metrics.jsonl``."""

    logger: str | None = None
    """TorchRL's logger of the figures: csv, tensorboard, wandb or mlflow, into ``logs`` in the run's folder; null for
    none. All but csv are packages of their own."""
    max_log: int = 268435456
    """Most bytes of ``metrics.jsonl``. Once it has so many it replaces ``metrics.1.jsonl``, and is begun anew."""


@dataclass(frozen=True)
class FleetConfig:
    """Engines and a learner on a Ray cluster, for `aurora-rl fleet` alone ([fleet](../fleet.md))."""

    address: str | None = None
    """Ray cluster to join: auto or host:port. null starts one on this host for as long as the fleet runs."""
    engines: dict[str, Any] = field(default_factory=dict)
    """Groups of engines by name: ``replicas``, ``num_cpus``, ``num_gpus`` and ``resources`` of each engine, and
    ``overrides``, its own ``key=value`` pairs."""
    learner: dict[str, Any] = field(default_factory=dict)
    """``num_cpus``, ``num_gpus``, ``resources`` and ``overrides`` of the learner."""
    max_restarts: int | None = None
    """Times that a member is started again before the fleet ends with an error; null has no limit."""
    timeout: float = 300.0
    """Most seconds that a member waits for its resources when the fleet starts."""


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
    They draft in turns as ``canary`` says, the first in place of the served weights and the second in place of the
    new ones. Nobody learns. Empty compares none."""
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    run_dir: str | None = None
    """New or empty folder of the run; null is ``runs/<time>``."""

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            object.__setattr__(self, name, frozen(value))

"""The serving half of a run whose engine is in this process, built from its spec."""

from __future__ import annotations

from dataclasses import replace

import torch

from aurora_rl.cli.assembly import LoadedTarget, engine_maker, opening, slot_length, wire_keys
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import naming
from aurora_rl.cli.spec import RunSpec
from aurora_rl.collectors.codec import Limits, checksum
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import engine_keys
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.sockets import engine_name
from aurora_rl.collectors.weights import WeightReceiver
from aurora_rl.envs import Request, SpecDecodeEnv, generation_processors
from aurora_rl.models.detokenizer import detokenize
from aurora_rl.models.loading import stop_token_ids
from aurora_rl.policies import Drafter, DrafterPolicy, TreeShape
from aurora_rl.policies.calibration import DrafterError, cost_table, measure_rounds
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.prefix_cache import PrefixCache
from aurora_rl.serving.canary import RoundTrialRules
from aurora_rl.serving.requests import RequestSource
from aurora_rl.serving.server import Capture, InferenceServer
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows


def embedded_server(
    spec: RunSpec,
    target: LoadedTarget,
    requests: RequestSource,
    usual: list[int],
    drafter: Drafter,
    log: MetricsLog,
    second_drafter: tuple[RunSpec, Drafter] | None = None,
) -> InferenceServer:
    """Build a server on an engine in this process, which puts the target's model into inference form.

    Rounds are timed with ``usual``, the token ids of a usual prompt. A second drafter, whose spec differs by the
    drafter alone, is compared with the first; then nobody learns. Drafters come in float32.
    """
    config, tree = spec.config, spec.tree
    drafters = [(spec, drafter)] if second_drafter is None else [(spec, drafter), second_drafter]
    layers = tuple(drafter.feature_layers)
    if second_drafter is not None:
        layers = tuple(sorted({*layers, *second_drafter[1].feature_layers}))
    num_nodes = max(run.tree.max_nodes for run, _ in drafters)
    handshake = Handshake.of(target.parts, drafter, spec.drafter_name, takes_map=True)
    stop_tokens = stop_token_ids(target.model, target.tokenizer)
    # A prompt with a budget of its own may leave less room than the configuration's.
    max_length = slot_length(config, target)
    usual = usual[: max_length // 2]
    budget = min(spec.sampling_params.token_budget, max_length - len(usual))
    tried = Request(0, torch.tensor(usual), replace(spec.sampling_params, max_tokens=budget))
    with naming(f"model={config.model}"):
        processors = generation_processors(target.model, stop_tokens) if config.generation_config == "auto" else None
        if processors is not None:
            processors(tried)
    engine = engine_maker(spec)(
        target.model, num_slots=config.engine.slots, max_length=max_length, feature_layers=layers
    )

    def new_policy(run: RunSpec, drafter: Drafter, version: int = 0) -> DrafterPolicy:
        return DrafterPolicy(
            drafter.serving_copy(spec.dtype, spec.device),
            engine.store,
            num_nodes=num_nodes,
            shape=run.tree,
            version=version,
            generator=torch.Generator(spec.device).manual_seed(config.seed),
            layers=None if tuple(drafter.feature_layers) == layers else layers,
        )

    faults: list[tuple[int, DrafterError]] = []  # by version

    def timed(policy: DrafterPolicy) -> TreeController | None:
        if not config.drafter.adaptive:
            return None
        shape = policy.shape
        try:
            candidates = TreeController.candidates(shape)
            costs = measure_rounds(engine, policy, tried, candidates, processors=processors)
        except DrafterError as error:
            faults.append((policy.version, error))
            alone = shape.without_drafter(shape.lookup) if shape.lookup else None
            policy.shape = alone or TreeShape(0, mode=shape.mode)
            return None
        log.write("costs", round_ms=cost_table(costs))
        return TreeController(costs)

    policies = [new_policy(*each, version) for version, each in enumerate(drafters)]
    trial_rules = _trial_rules(config)
    policy, controllers = policies[0], [timed(each) for each in policies]
    if second_drafter is None and trial_rules is not None:
        policies.append(new_policy(spec, drafter))
    tokenizer = target.tokenizer  # not the target: its plain weights are not to outlive their packed forms
    if config.engine.prefix_cache_tokens:  # not before: what is measured are not requests
        engine.prefix_cache = PrefixCache(config.engine.prefix_cache_tokens)
        for each in policies:
            each.prefix_cache = PrefixCache(config.engine.prefix_cache_tokens)
    if config.drafter.history and any(run.tree.lookup for run, _ in drafters):  # nor are they to find answers
        policies[-1].earlier = policy.earlier = EarlierAnswers(config.drafter.history)
    env = SpecDecodeEnv(
        engine,
        requests,
        num_nodes=num_nodes,
        rule=spec.rule,
        draft_mode=tree.mode,
        stop_tokens=stop_tokens,
        decode=lambda tokens: detokenize(tokenizer, tokens),
        processors=processors,
        on_refused=requests.refused,
    )
    sink, receiver = (None, None) if second_drafter is not None else _wire(config, handshake, policy.drafter)
    windows = BaselineWindows(config.baseline.share, config.baseline.window, config.seed)
    server = InferenceServer(
        env,
        policy,
        windows=windows,
        log=log,
        controller=controllers[0],
        sink=sink,
        receiver=receiver,
        trial_rules=trial_rules,
        second_policy=policies[-1],
        second_controller=controllers[-1],
        watched=True,
        note=requests.completed,
        captures=Capture(config.engine.capture_rate, config.privacy.opt_out, config.seed),
        part_tokens=config.engine.part_tokens,
    )
    for version, fault in faults:
        which = "every request is" if second_drafter is None else f"in the turns of version {version} every request is"
        server.note_fault(str(fault), version, f"{which} served without the drafter")
    return server


def _wire(config: Config, handshake: Handshake, drafter: Drafter) -> tuple[TrajectorySink, WeightReceiver]:
    """Open the engine's ends of the wire."""
    keys, limits = wire_keys(config, engine_keys), Limits(max_bytes=config.wire.max_message)
    name = engine_name(keys)
    with opening("wire.trajectories", config.wire.trajectories):
        sink = TrajectorySink(
            config.wire.trajectories,
            handshake=handshake,
            keys=keys,
            capacity=config.wire.queue,
            max_bytes=config.wire.queue_bytes,
            limits=limits,
            max_age=config.privacy.max_age,
            name=name,
        )
    with opening("wire.weights", config.wire.weights):
        receiver = WeightReceiver(
            config.wire.weights,
            handshake=handshake,
            keys=keys,
            checksum=checksum(drafter.published()),
            name=name,
            limits=limits,
        )
    return sink, receiver


def _trial_rules(config: Config) -> RoundTrialRules | None:
    """Return how new weights are tried; None swaps them in at once."""
    settings = config.canary
    if not settings.share:
        return None
    return RoundTrialRules(
        share=settings.share,
        window=settings.window,
        false_alarm_rate=settings.false_alarm_rate,
        margin=settings.margin,
        max_rounds=settings.max_rounds,
        seed=config.seed,
    )

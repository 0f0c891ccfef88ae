"""The training half of a run, built from its spec."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torchrl.objectives import LossModule

from aurora_rl.cli.assembly import drafter_from_parts, load_alone, opening, wire_keys
from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import naming
from aurora_rl.cli.frozen import plain
from aurora_rl.cli.spec import RunSpec
from aurora_rl.collectors.codec import Limits
from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import learner_keys
from aurora_rl.collectors.weights import WeightPublisher
from aurora_rl.envs.verification.rules import require_replayable, rule_of_code
from aurora_rl.memory import return_freed_memory
from aurora_rl.models.target_head import TargetHead
from aurora_rl.objectives import Objective, SumLoss, make_objectives
from aurora_rl.policies import Drafter
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.training.engine_canary import EngineCanary, EngineTrialRules
from aurora_rl.training.gate import Gate
from aurora_rl.training.learner import Learner
from aurora_rl.training.moving_vocab import MovingVocab
from aurora_rl.training.optimizers import drafter_optimizers
from aurora_rl.training.parallel import ParallelLoss, Ranks, start_alike
from aurora_rl.training.replay import trajectory_buffer
from aurora_rl.training.wire_ends import TrajectorySource, WeightSink
from aurora_rl.trajectories import validate


def build_learner(spec: RunSpec, log: MetricsLog, run_dir: Path, ranks: Ranks | None = None) -> Learner:
    """Build the training half of the run in ``run_dir``, whose metrics go to ``log``.

    With ``ranks`` this process is rank 0 of a learner of several, and the others call :func:`build_follower`.
    """
    config, settings = spec.config, spec.config.learner
    keys = wire_keys(config, learner_keys)  # raises before a model is loaded
    parts = load_alone(spec)
    drafter = drafter_from_parts(spec, parts)
    handshake = Handshake.of(parts, drafter, spec.drafter_name, takes_map=not config.engine.remote)
    loss, optimizers = learning(spec, drafter.to(spec.device), parts.head)
    shared = loss if ranks is None else ParallelLoss(loss, ranks, optimizers)
    vocab_size, width = parts.head.weight.shape
    del parts
    return_freed_memory(collect=True)
    feature_size = width * len(drafter.feature_layers)

    def check_one(trajectory: TensorDictBase) -> None:
        validate(trajectory, vocab_size=vocab_size, hidden_size=width, feature_size=feature_size)
        require_replayable(rule_of_code(int(trajectory["sampling", "rule"])))

    with naming("learner.recording", (ValueError, OSError)):
        folder = settings.recording
        recording = None if folder is None else TrajectoryDataset(folder, drafter.feature_layers)
        if recording is not None:
            recording.folder.mkdir(parents=True, exist_ok=True)
    outputs = Outputs(log)

    def save_trajectory(trajectory: TensorDictBase) -> None:
        if recording is not None:
            outputs.write("a trajectory", lambda: recording.append(trajectory))

    limits = Limits(max_bytes=config.wire.max_message)
    with ExitStack() as opened:  # closed again if what follows fails
        with opening("wire.trajectories", config.wire.trajectories):
            collector = ZMQCollector(
                config.wire.trajectories,
                handshake=handshake,
                keys=keys,
                validate=check_one,
                on_trajectory=save_trajectory,
                limits=limits,
            )
        opened.callback(collector.shutdown)
        with opening("wire.weights", config.wire.weights):
            publisher = WeightPublisher(config.wire.weights, handshake=handshake, keys=keys, limits=limits)
        opened.callback(publisher.close)
        canary = _canary(config, publisher, log)
        result = assembled(
            spec, drafter, shared, optimizers, collector, publisher, log, outputs, run_dir / "learner", canary
        )
        if settings.resume is not None:
            result.resume(Path(settings.resume))
        if isinstance(shared, ParallelLoss):
            _begin_together(spec, shared, drafter, optimizers)
        opened.pop_all()
    return result


def build_follower(spec: RunSpec, ranks: Ranks) -> tuple[ParallelLoss, list[torch.optim.Optimizer]]:
    """Return loss and optimizers of a rank that is not rank 0, which start with the weights and states of rank 0."""
    parts = load_alone(spec)
    drafter = drafter_from_parts(spec, parts)
    loss, optimizers = learning(spec, drafter.to(spec.device), parts.head)
    del parts
    return_freed_memory(collect=True)
    shared = ParallelLoss(loss, ranks, optimizers)
    _begin_together(spec, shared, drafter, optimizers)
    torch.manual_seed(spec.config.seed + ranks.rank)  # for objectives that draw random numbers
    return shared, optimizers


def steps_depend_on(spec: RunSpec) -> dict[str, Any]:
    """Return the settings that make a learner's steps differ, by their keys: all its ranks must have the same."""
    config = spec.config
    return {
        "objectives": plain(config.objectives),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "drafter.name": spec.drafter_name,
        "drafter.options": plain(config.drafter.options),
        "drafter.adapters": list(config.drafter.adapters),
        "drafter.adapter_rank": config.drafter.adapter_rank,
        **{f"learner.{key}": getattr(config.learner, key) for key in ("parallel", "muon_lr", "adam_lr")},
    }


def _begin_together(
    spec: RunSpec, loss: ParallelLoss, drafter: Drafter, optimizers: list[torch.optim.Optimizer]
) -> None:
    """Give all ranks the weights and states of rank 0, each its shard of them if that is how they learn."""
    start_alike(loss, optimizers, steps_depend_on(spec))
    if spec.config.learner.parallel == "fsdp":
        from aurora_rl.training.sharding import shard  # imports FSDP2, which takes a while

        shard(loss, drafter, optimizers)


def _canary(config: Config, publisher: WeightPublisher, log: MetricsLog) -> EngineCanary | None:
    """Return what tries new weights at a share of the engines; None publishes them to all at once."""
    settings = config.canary
    if not settings.engines:
        return None
    rules = EngineTrialRules(
        settings.engines, settings.requests, settings.false_alarm_rate, settings.margin, settings.max_requests,
        config.seed,
    )  # fmt: skip
    return EngineCanary(publisher, rules, log)


def learning(spec: RunSpec, drafter: Drafter, head: TargetHead) -> tuple[SumLoss, list[torch.optim.Optimizer]]:
    """Return the loss of the configured objectives, and the optimizers of the drafter's parameters."""
    # A copy: an engine changes the form of the target's weights in place, and a view would keep the whole file of
    # weights in memory. Autocast multiplies the head in bfloat16, whatever it is kept in.
    head, settings = copy.deepcopy(head), spec.config.learner
    if spec.dtype != torch.bfloat16:
        head = head.float()
    with naming("objectives"):
        loss = SumLoss(make_objectives(plain(spec.config.objectives), drafter, head))
    with naming(f"drafter.name={spec.drafter_name}"):
        return loss, drafter_optimizers(drafter, muon_lr=settings.muon_lr, adam_lr=settings.adam_lr)


def assembled(
    spec: RunSpec,
    drafter: Drafter,
    loss: LossModule,
    optimizers: list[torch.optim.Optimizer],
    collector: TrajectorySource,
    publisher: WeightSink,
    log: MetricsLog,
    outputs: Outputs,
    states: Path,
    canary: EngineCanary | None = None,
) -> Learner:
    """Return the learner of a spec, with the loss and the optimizers of :func:`learning` and a wire."""
    config, settings = spec.config, spec.config.learner
    vocab = None
    if spec.vocab_follows and (drafter.vocab_tables or config.drafter.vocab_follows):
        head = next(each.head for each in loss.modules() if isinstance(each, Objective))
        with naming("drafter.vocab_follows"):
            vocab = MovingVocab(drafter, head, optimizers)
    return Learner(
        drafter=drafter,
        loss=loss,
        optimizers=optimizers,
        buffer=trajectory_buffer(settings.buffer, settings.batch_size, config.seed, settings.buffer_bytes),
        collector=collector,
        publisher=publisher,
        gate=Gate(config.gate.requests, config.gate.margin, spec.tree, drafter.serving_copy(spec.dtype)),
        log=log,
        serving_dtype=spec.dtype,
        batch_size=settings.batch_size,
        replay=settings.replay,
        publish_every=settings.publish_every,
        max_skipped=settings.max_skipped,
        states=states,
        keep=settings.keep,
        keep_states=config.checkpoint.keep,
        save_buffer=config.checkpoint.buffer,
        max_age=config.privacy.max_age,
        once=config.privacy.zero_retention,
        outputs=outputs,
        canary=canary,
        vocab=vocab,
    )

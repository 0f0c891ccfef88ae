"""The serving half of a run: an engine, the server that drives it, and the engine's ends of the wire."""

from __future__ import annotations

import copy
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, cast

import torch
from typing_extensions import override

from aurora_rl.cli import spec
from aurora_rl.cli.config import Config, ConfigError
from aurora_rl.collectors.sink import TrajectorySink
from aurora_rl.collectors.weights import WeightReceiver
from aurora_rl.envs import Completion, Engine, Request, SamplingParams, SpecDecodeEnv, generation_processors
from aurora_rl.envs.processors import text_settings
from aurora_rl.envs.sglang.client import SGLangClient, SGLangError, reserved_context
from aurora_rl.envs.sglang.control import ControlError
from aurora_rl.models.loading import embedded_model_path, stop_token_ids
from aurora_rl.policies import Drafter, DrafterPolicy, TreeShape
from aurora_rl.policies.formats.files import save_drafter
from aurora_rl.policies.tree_controller import TreeController
from aurora_rl.serving.answers import Answers
from aurora_rl.serving.requests import RequestQueue
from aurora_rl.serving.server import DrafterFault, InferenceServer, cost_table, measure_rounds
from aurora_rl.serving.sglang import SGLangServer
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.rates import BaselineWindows


class Serving(ABC):
    """What a run needs of its serving half.

    Attributes:
        server: steps until the traffic is served, and keeps the figures.
        answers: what each request was answered, written to ``run_dir/answers.jsonl`` as it ends.
    """

    server: InferenceServer | SGLangServer

    def __init__(self, target: spec.Target, requests: RequestQueue, run_dir: Path) -> None:
        self.answers = Answers(run_dir / "answers.jsonl", requests, target.tokenizer)

    @property
    @abstractmethod
    def queued(self) -> int:
        """Trajectories that wait to be sent."""

    @property
    def dropped(self) -> int:
        """Trajectories given up so far."""
        return self.server.dropped

    @property
    @abstractmethod
    def refused(self) -> str | None:
        """Why the learner refuses this engine, if it does."""

    @abstractmethod
    def save_drafter(self, run_dir: Path) -> None:
        """Leave the drafter that was served last in ``run_dir/drafter``, if it has weights."""

    @abstractmethod
    def close(self) -> None:
        """Send what can still be sent, and close."""


def serving(
    config: Config, target: spec.Target, requests: RequestQueue, made: Drafter, log: MetricsLog, run_dir: Path
) -> Serving:
    """The serving half that ``engine.name`` asks for.

    Args:
        config: the run's.
        target: the loaded target; an engine in this process puts its model into inference form.
        requests: where requests come from.
        made: the drafter, float32.
        log: the run's metrics.
        run_dir: the run's folder.
    """
    if config.engine.name == "sglang":
        return SGLangServing(config, target, requests, made, log, run_dir)
    return EmbeddedServing(config, target, requests, made, log, run_dir)


class EmbeddedServing(Serving):
    """TransformersEngine in this process; arguments as of :func:`serving`."""

    server: InferenceServer

    def __init__(
        self,
        config: Config,
        target: spec.Target,
        requests: RequestQueue,
        made: Drafter,
        log: MetricsLog,
        run_dir: Path,
    ) -> None:
        super().__init__(target, requests, run_dir)
        greeting, device = spec.handshake(target.parts, made, config.drafter.name), spec.device_of(config)
        tree = spec.shape(config)
        stop_tokens = stop_token_ids(target.model, target.tokenizer)
        prompt = torch.tensor(requests.first_prompts(1)[0])
        usual = Request(
            0,
            prompt,
            # A prompt with a budget of its own may leave less room than the configuration's.
            min(config.max_new_tokens, config.engine.max_length - len(prompt)),
            SamplingParams(config.temperature, config.top_k, config.top_p),
        )
        processors = None
        if config.generation_config == "auto":
            try:
                processors = generation_processors(target.model, stop_tokens)
                if processors is not None:
                    processors(usual)
            except ValueError as error:
                raise ConfigError(f"model={config.model}: {error}") from error
        kind = spec.engine_class(config)
        assert kind is not None  # of SGLang see SGLangServing
        engine: Engine = cast(Any, kind)(
            target.model,
            num_slots=config.engine.slots,
            max_length=config.engine.max_length,
            feature_layers=made.feature_layers,
        )
        served = copy.deepcopy(made).to(device=device, dtype=spec.dtype_of(config)).eval().requires_grad_(False)
        policy = DrafterPolicy(
            served,
            engine.store,
            num_nodes=tree.most_nodes,
            shape=tree,
            generator=torch.Generator(device).manual_seed(config.seed),
        )
        shapes, fault = None, None
        if config.drafter.adaptive:
            tried = TreeController.candidates(tree, free=made.min_depth > 0)
            try:
                costs = measure_rounds(engine, policy, usual, tried, processors=processors)
            except DrafterFault as error:
                fault = error
                policy.shape = TreeShape(tree.depth, free=True) if made.min_depth else TreeShape(0, mode=tree.mode)
            else:
                log.write("costs", round_ms=cost_table(costs))
                shapes = TreeController(costs)
        tokenizer = target.tokenizer  # not the target: its plain weights are not to outlive their packed forms
        env = SpecDecodeEnv(
            engine,
            requests,
            num_nodes=tree.most_nodes,
            rule=spec.rule_name(config),
            draft_mode=tree.mode,
            stop_tokens=stop_tokens,
            decode=lambda tokens: str(tokenizer.decode(tokens)),
            processors=processors,
            on_completion=self._completed,
            on_refused=requests.refused,
        )
        with spec.opening("wire.trajectories", config.wire.trajectories):
            self._sink = TrajectorySink(config.wire.trajectories, handshake=greeting, capacity=config.wire.queue)
        with spec.opening("wire.weights", config.wire.weights):
            self._receiver = WeightReceiver(config.wire.weights, handshake=greeting)
        self.server = InferenceServer(
            env,
            policy,
            windows=BaselineWindows(config.baseline.share, config.baseline.window, config.seed),
            log=log,
            shapes=shapes,
            sink=self._sink,
            receiver=self._receiver,
            note=self.answers.completed,
        )
        if fault is not None:
            self.server.note_fault(str(fault), None, "every request is served without the drafter")

    def _completed(self, completion: Completion) -> None:
        self.server.completed(completion)

    @property
    @override
    def queued(self) -> int:
        return self._sink.queued

    @property
    @override
    def refused(self) -> str | None:
        return self._receiver.error

    @override
    def save_drafter(self, run_dir: Path) -> None:
        drafter = self.server.policy.drafter
        if drafter.formats:
            save_drafter(drafter, run_dir / "drafter")

    @override
    def close(self) -> None:
        self._sink.close(timeout=2.0)
        self._receiver.close()


class SGLangServing(Serving):
    """An SGLang server, launched here or attached to; arguments as of :func:`serving`."""

    server: SGLangServer

    def __init__(
        self,
        config: Config,
        target: spec.Target,
        requests: RequestQueue,
        made: Drafter,
        log: MetricsLog,
        run_dir: Path,
    ) -> None:
        super().__init__(target, requests, run_dir)
        greeting, settings = spec.handshake(target.parts, made, config.drafter.name), config.engine
        if config.generation_config == "auto" and (found := text_settings(target.model.generation_config)):
            values = ", ".join(f"{name}={value!r}" for name, value in found.items())
            raise ConfigError(
                f"model={config.model}: its generation config sets {values}, and SGLang verifies drafts without that; "
                "set generation_config=ignore to serve raw logits, or engine.name=transformers"
            )
        stop_tokens = stop_token_ids(target.model, target.tokenizer)
        target.model.cpu()  # the server loads its own, on the device that this one leaves
        if spec.device_of(config).type == "cuda":
            torch.cuda.empty_cache()
        try:
            self._engine = (
                self._launch(config, made, target.parts.config.max_position_embeddings, run_dir)
                if settings.url is None
                else SGLangClient(settings.url, settings.plugin_address)
            )
            try:
                if config.temperature > 0 and self._engine.status()["device"] == "cpu":
                    raise ControlError(
                        f"temperature={config.temperature:g}: on a CPU SGLang verifies by argmax; set temperature=0, or"
                        " engine.name=transformers"
                    )
                self.server = SGLangServer(
                    self._engine,
                    lambda: self._engine.attach(
                        handshake=greeting,
                        trajectories=config.wire.trajectories,
                        weights=config.wire.weights,
                        capture_rate=settings.capture_rate,
                        queue=config.wire.queue,
                    ),
                    requests,
                    slots=settings.slots,
                    depth=spec.shape(config).depth,
                    stop_tokens=stop_tokens,
                    log=log,
                    note=self.answers.completed,
                    on_refused=requests.refused,
                )
            except BaseException:
                self._engine.close()
                raise
        except (SGLangError, ControlError) as error:
            raise ConfigError(f"engine.name=sglang: {error}") from error

    @staticmethod
    def _launch(config: Config, made: Drafter, context: int, run_dir: Path) -> SGLangClient:
        folder, tree = run_dir / "drafter-served", spec.shape(config)
        room = context - reserved_context(tree.depth, tree.width, tree.budget)
        if config.engine.max_length > room:
            raise SGLangError(
                f"engine.max_length={config.engine.max_length} and the drafts exceed the model's context of {context}; "
                f"set engine.max_length={room} or less"
            )
        save_drafter(made, folder, "sglang")
        return SGLangClient.launch(
            embedded_model_path() if config.model == "smollm2" else config.model,
            drafter=folder,
            depth=tree.depth,
            width=tree.width,
            num_nodes=tree.budget,
            slots=config.engine.slots,
            max_length=config.engine.max_length,
            dtype=str(spec.dtype_of(config)).removeprefix("torch."),
            device=spec.device_of(config).type,
            log=run_dir / "sglang.log",
            arguments=config.engine.arguments,
        )

    @property
    @override
    def queued(self) -> int:
        return self.server.status.get("queued", 0)

    @property
    @override
    def refused(self) -> str | None:
        return self.server.status.get("refused") or self.server.status.get("error") or None

    def save_drafter(self, run_dir: Path) -> None:
        """See :meth:`Serving.save_drafter`: the learner has left there what it published last."""
        if (published := run_dir / "learner" / "drafter").is_dir():
            shutil.copytree(published, run_dir / "drafter", dirs_exist_ok=True)

    def close(self) -> None:
        """Detach, so that what is recorded is sent; a server that was launched here ends."""
        self.server.close()
        try:
            self.server.watch()
            self._engine.detach()
        except ControlError:
            pass  # it is gone already
        self._engine.close()

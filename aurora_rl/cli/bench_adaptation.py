"""``aurora-rl bench adaptation``: how fast drafters learn, on the phases of a scenario and against each other."""

from __future__ import annotations

import argparse
import copy
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils.data import ConcatDataset
from torch.utils.flop_counter import FlopCounterMode

from aurora_rl.adaptation import report
from aurora_rl.adaptation.busy_process import BusyProcess
from aurora_rl.adaptation.live import TimedRequests, measure_in_turns
from aurora_rl.adaptation.recorded_stream import Parts, RecordedPhase, record_plain_decoding
from aurora_rl.adaptation.scenario import PLAIN, Arm, Phase, Scenario, phase_prompts, read_scenario, to_yaml
from aurora_rl.adaptation.simulation import ArmRun, LocalWire, add_answers, simulate
from aurora_rl.cli.arguments import add_config_arguments
from aurora_rl.cli.assembly import VOCAB_PROMPTS, LoadedTarget, engine_maker, load, request_queue, start_drafter
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.config.privacy import check_records
from aurora_rl.cli.embedded import embedded_server
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.frozen import plain
from aurora_rl.cli.learner import assembled, learning
from aurora_rl.cli.output import plain_console
from aurora_rl.cli.progress import watch
from aurora_rl.cli.signals import Stop
from aurora_rl.cli.spec import RunSpec, resolve
from aurora_rl.cli.training_data import ShownRecording, fingerprint
from aurora_rl.models.loading import stop_token_ids
from aurora_rl.objectives import SumLoss
from aurora_rl.policies import Drafter, TreeShape
from aurora_rl.policies.formats.files import load_drafter, save_drafter
from aurora_rl.policies.lookup import EarlierAnswers
from aurora_rl.storage import write_file
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.training.offline import Trajectories
from aurora_rl.training.steps import train_on, train_step
from aurora_rl.trajectories import pack
from aurora_rl.workload.traffic import Prompt

HELP = "record a scenario's stream once, let arms draft for it and learn from it, and compare how fast they learn"

_RECORDING_SLOTS = 32  # answers do not depend on how many are read at once
_NO_FIGURE = {"http", "wire", "checkpoint", "canary", "compare", "privacy", "telemetry", "run_dir"}  # depends on these


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--scenario", default="day0", help="name of a scenario of the package, or a YAML file (day0)")
    parser.add_argument("--out", type=Path, help="folder of the results; runs/adaptation/<scenario> by default")
    parser.add_argument("--arms", help="names of some of the scenario's arms")
    add_config_arguments(parser, "drafter.name=eagle3")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Do what is not done yet in the folder of the results, and write the report. Returns the exit status.

    Raises:
        ConfigError: Scenario, arms or configuration cannot be used, or the folder has results of others.
    """
    with naming("--scenario"):
        scenario = read_scenario(arguments.scenario)
    wanted = list(scenario.arms)
    if arguments.arms is not None:
        wanted = [name.strip() for name in arguments.arms.split(",")]
        if unknown := [name for name in wanted if name not in scenario.arms]:
            raise ConfigError(f"--arms: unknown {unknown[0]!r}; the scenario has {', '.join(scenario.arms)}")
    out = arguments.out or Path("runs/adaptation") / Path(arguments.scenario).stem
    bench = _Bench(arguments, scenario, wanted, out, plain_console())
    try:
        bench.run()
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on in {out}")
        return 130
    return 0


class _Bench:
    """One scenario in one folder; ``wanted`` are the arms that are to have the stream."""

    def __init__(
        self, arguments: argparse.Namespace, scenario: Scenario, wanted: Sequence[str], out: Path, console: Console
    ) -> None:
        self._scenario, self._wanted, self._out, self._console = scenario, wanted, out, console
        self._given = arguments.config, arguments.overrides
        self._started: dict[str, Drafter] = {}
        self._specs, self._base = {}, self._spec()
        engine_maker(self._base)
        check_records(self._base.config)
        for name, arm in scenario.arms.items():
            with naming(f"arm {name!r}"):
                spec = self._specs[name] = self._spec(*arm.set, *["drafter.adaptive=false"] * arm.lookup_only)
                if arm.lookup_only and not spec.tree.lookup:
                    raise ConfigError("it is lookup_only, and nothing is looked up; set drafter.lookup=8")
        with naming("--scenario"):
            self._prompts, self._training = phase_prompts(scenario, self._base.config.seed)
        self._ends = list(itertools.accumulate(map(len, self._prompts)))  # requests up to the end of each phase
        self._settle()

    def _spec(self, *pairs: str) -> RunSpec:
        path, overrides = self._given
        config = load_config(path, [*self._scenario.set, *overrides, *pairs])
        if config.temperature > 0 and config.drafter.mode != "topk":
            raise ConfigError(f"drafter.mode={config.drafter.mode}: arms draft what is likeliest; set it to topk")
        return resolve(config)

    def _settle(self) -> None:
        """Keep what the results depend on in their folder, and refuse a folder of other results.

        Arms may be added to a folder, if they read what is recorded.
        """
        tree = asdict(self._scenario)
        stream = {key: tree[key] for key in ("phases", "mixed", "training", "set", "window", "part_tokens", "live")}
        prompts = [*self._training, *(prompt for part in self._prompts for prompt in part)]
        stream["prompts"] = fingerprint((), prompts)
        settings = {"stream": stream, "configuration": _configuration(self._base)}
        path = self._out / "settings.json"
        if path.exists():
            for part, values in json.loads(path.read_text()).items():
                for key, value in values.items():
                    if key not in _NO_FIGURE and settings[part].get(key) != value:
                        raise ConfigError(
                            f"{self._out} holds results of {part} {key}={value!r:.200}, and this run has "
                            f"{settings[part].get(key)!r:.200}; name another folder by --out"
                        )
        else:
            self._out.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings, indent=1) + "\n")
        (self._out / "scenario.yaml").write_text(to_yaml(self._scenario))

    def run(self) -> None:
        """Record, let each arm have the stream, measure, and report; whatever is done already is kept."""
        target = load(self._base)
        with naming("the scenario"):
            first = request_queue(self._base, target, self._prompts[0]).first_prompts(VOCAB_PROMPTS)
        drafters = {name: self._start(spec, target, first) for name, spec in self._specs.items()}
        layers = sorted({layer for drafter in drafters.values() for layer in drafter.feature_layers})
        if self._training:
            self._record("training", None, self._training, layers)
        for number, prompts in enumerate(self._prompts):
            self._record(f"phase-{number}", self._own(number), prompts, layers)
        self._layers = layers
        torch.set_num_threads(self._base.config.learner.threads)
        for name in self._wanted:
            arm = self._scenario.arms[name]
            for seed in range(self._scenario.seeds if arm.learns else 1):
                self._arm(name, arm, seed, target, first)
        torch.set_num_threads(self._base.config.engine.threads)
        if self._scenario.live.requests:
            self._live(drafters)
        results = report.collect(self._out, self._scenario)
        report.write(self._out, results)
        self._console.print(f"written to {self._out}: results.json, report.md, *.png", soft_wrap=True)

    def _own(self, number: int) -> Phase | None:
        """Return the phase whose target answers part ``number`` of the stream; None for the run's own target."""
        return None if self._scenario.mixed else self._scenario.phases[number]

    # ---- the stream -------------------------------------------------------------------------------------------------

    def _record(self, name: str, phase: Phase | None, prompts: Sequence[Prompt], layers: Sequence[int]) -> None:
        recording = ShownRecording(self._out / "stream" / name, layers)
        if len(recording) == len(prompts):
            return
        target = self._target_of(phase)
        queue = request_queue(self._base, target, prompts)
        if queue.failed:
            raise ConfigError(f"--scenario: {queue.failed[0]}")
        config, done = self._base.config, len(recording)
        with watch(self._console, f"recording {name}", len(prompts), done) as recording.watch:
            record_plain_decoding(
                target.model,
                list(iter(queue, None)),
                recording,
                layers,
                num_slots=max(config.engine.slots, _RECORDING_SLOTS),
                stop_tokens=stop_token_ids(target.model, target.tokenizer),
                seed=config.seed,
                engine=engine_maker(self._base),
                rule=self._base.rule,
            )

    def _target_of(self, phase: Phase | None) -> LoadedTarget:
        spec = self._base
        if phase is not None and phase.target_dtype is not None:
            spec = replace(spec, dtype=getattr(torch, phase.target_dtype))
        target = load(spec)
        if phase is not None and phase.target_noise:
            generator = torch.Generator().manual_seed(spec.config.seed)
            head = target.model.get_output_embeddings().weight
            with torch.no_grad():
                for name, weight in target.model.named_parameters():
                    # The learner has the head of the first target, as a deployment has whose target was tuned.
                    if weight.ndim == 2 and weight is not head and "embed" not in name:
                        noise = torch.randn(weight.shape, generator=generator).to(weight)
                        weight.add_(phase.target_noise * weight.std() * noise)
        return target

    def _stream(self, name: str, drafter: Drafter) -> Trajectories | Parts:
        """Return the training traffic, or all phases in order, as a drafter reads them; the phases perhaps in parts."""
        wanted = drafter.feature_layers
        if name == "training":
            return RecordedPhase(self._out / "stream" / name, self._layers, wanted)
        folders = [self._out / "stream" / f"phase-{number}" for number in range(len(self._prompts))]
        whole: Trajectories = ConcatDataset([RecordedPhase(folder, self._layers, wanted) for folder in folders])
        return Parts(whole, self._scenario.part_tokens) if self._scenario.part_tokens else whole

    # ---- arms -------------------------------------------------------------------------------------------------------

    def _arm(self, name: str, arm: Arm, seed: int, target: LoadedTarget, first: list[list[int]]) -> None:
        """Let an arm have the stream, from where it was interrupted, unless there is a result."""
        folder = self._out / "arms" / f"{name}-{seed}"
        spec = self._specs[name]
        settings = {"arm": asdict(arm), "configuration": _configuration(spec)}
        done, begun, state = folder / "result.json", folder / "state.pt", None
        if done.exists() or begun.exists():
            state = json.loads(done.read_text()) if done.exists() else torch.load(begun, weights_only=True)
            earlier = state["settings"]["configuration"]
            state["settings"]["configuration"] = {key: earlier[key] for key in earlier if key not in _NO_FIGURE}
            if state["settings"] != settings:
                raise ConfigError(f"{folder} has the result of another arm {name!r}; name another folder by --out")
        if done.exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        drafter = self._start(spec, target, first, seed)
        if arm.trained:
            drafter = self._trained(spec, drafter, target)
        stream, began = self._stream("phases", drafter), time.monotonic()
        last = self._scenario.live.requests
        sampled = {end - last for end in self._ends} if last else set()
        learner, wire, flops = None, LocalWire(), 0
        serving = drafter.serving_copy(spec.dtype)
        if arm.learns:
            learning_spec = resolve(replace(spec.config, seed=spec.config.seed + seed))
            loss, optimizers = learning(spec, drafter, target.parts.head)
            flops = step_flops(loss, stream, spec.config.learner.batch_size)
            log = MetricsLog(folder / "metrics.jsonl", "learner")
            learner = assembled(
                learning_spec, drafter, loss, optimizers, wire, wire, log, Outputs(log), folder / "learner"
            )
        history = spec.config.drafter.history if spec.tree.lookup else 0
        earlier = EarlierAnswers(history) if history else None
        at = 0 if state is None else len(state["run"]["tokens"])
        with watch(self._console, f"arm {name}, seed {seed}", len(stream), at) as shown:

            def tell(done: int, run: ArmRun) -> None:
                recent = run.counts.part(max(done - 40, 0), done)
                shown.tell(done, f"acceptance {recent.acceptance_length():.2f}")

            def keep(request: int, tensors: dict[str, torch.Tensor]) -> None:
                weights = {key: value.contiguous() for key, value in tensors.items()}
                save_file(weights, folder / f"at-{request}.safetensors")

            def save(so_far: dict[str, Any]) -> None:
                write_file(begun, lambda path: torch.save({"settings": settings, **so_far}, path))

            result = simulate(
                stream, serving, _shape(spec, arm), learner=learner, wire=wire, earlier=earlier,
                by_part=arm.by_part, pace=self._scenario.pace, num_slots=spec.config.engine.slots, points=sampled,
                keep=keep, tell=tell, save=save, state=state,
            )  # fmt: skip
        figures = {
            "arm": name,
            "seed": seed,
            "learns": arm.learns,
            "settings": settings,
            "flops_per_step": flops,
            "batch_size": spec.config.learner.batch_size,
            "seconds": round(time.monotonic() - began, 1),
            **({"positions": stream.positions} if isinstance(stream, Parts) else {}),
            **asdict(result),
        }
        write_file(done, json.dumps(figures) + "\n")
        begun.unlink(missing_ok=True)

    def _start(self, spec: RunSpec, target: LoadedTarget, first: list[list[int]], seed: int = 0) -> Drafter:
        """Return the drafter that arms of these settings start from."""
        key = json.dumps([*_origin(spec), spec.tree.depth, seed])
        if key not in self._started:
            self._started[key] = start_drafter(spec, target, first, seed=spec.config.seed + seed).to(spec.device)
        return copy.deepcopy(self._started[key])

    def _trained(self, spec: RunSpec, drafter: Drafter, target: LoadedTarget) -> Drafter:
        """Return a drafter that has learned from the training traffic, once for all arms of one configuration."""
        settings = spec.config.learner
        # As many steps for a request as arms get that learn.
        replay = min(settings.replay, max(int(self._scenario.pace * settings.batch_size) - 1, 0))
        parts = [*_origin(spec), settings.muon_lr, settings.adam_lr, replay, settings.batch_size]
        parts += [plain(spec.config.objectives), spec.config.seed]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        folder = self._out / "trained" / name[:12]
        if folder.exists():
            return load_drafter(folder, target.parts, spec.drafter_class, options=plain(spec.config.drafter.options))
        stream = self._stream("training", drafter)
        loss, optimizers = learning(spec, drafter, target.parts.head)
        with watch(self._console, "training", len(stream), 0) as shown:
            steps = train_on(
                [stream[index] for index in range(len(stream))], loss, optimizers, batch_size=settings.batch_size,
                replay=replay, autocast=spec.dtype == torch.bfloat16, seed=spec.config.seed,
            )  # fmt: skip
            for seen, value, _ in steps:
                shown.tell(seen, f"loss {value:.3f}")
        save_drafter(drafter, folder)
        return drafter

    # ---- tokens per second ------------------------------------------------------------------------------------------

    def _live(self, drafters: dict[str, Drafter]) -> None:
        """Measure the last requests of each phase with the weights that each arm had when they came."""
        live, ends = self._scenario.live, self._ends
        names = live.arms or list(self._scenario.arms)
        arms = [name for name in names if (self._out / "arms" / f"{name}-0" / "result.json").exists()]
        missing = []
        for phase, slots in itertools.product(range(len(ends)), live.slots):
            path = self._out / "live" / f"phase-{phase}-slots-{slots}.json"
            if not (path.exists() and set(json.loads(path.read_text())["arms"]) == {*arms, PLAIN}):
                missing.append((phase, slots, path))
        with ExitStack() as stack:
            learns = [name for name in arms if missing and self._scenario.arms[name].learns]
            learners = {name: stack.enter_context(self._busy(name)) for name in learns}
            for phase, slots, path in missing:
                self._console.print(f"tokens per second: phase {phase}, {slots} slots", soft_wrap=True)
                path.parent.mkdir(exist_ok=True)
                samples = self._measure(arms, phase, ends[phase] - live.requests, slots, drafters, learners)
                path.write_text(json.dumps({"arms": [PLAIN, *arms], "samples": samples}, indent=1) + "\n")

    def _busy(self, name: str) -> BusyProcess:
        """Return the process that learns next to an arm: always from the first requests, as its pace alone matters."""
        path, overrides = self._given
        pairs = [*self._scenario.set, *overrides, *self._scenario.arms[name].set]
        return BusyProcess(busy_learner, path, pairs, self._out / "stream" / "phase-0", self._layers)

    def _measure(
        self,
        arms: Sequence[str],
        phase: int,
        point: int,
        slots: int,
        drafters: dict[str, Drafter],
        learners: dict[str, BusyProcess],
    ) -> list[dict[str, Any]]:
        live, prompts = self._scenario.live, self._prompts[phase][-self._scenario.live.requests :]
        plain = self._spec("drafter.name=ngram", "drafter.lookup=0", "drafter.adaptive=false")
        servers, requests = {}, {}
        with ExitStack() as stack:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            for name in (PLAIN, *arms):
                spec = _alone(plain if name == PLAIN else self._specs[name], slots, folder / name)
                target = self._target_of(self._own(phase))
                if name == PLAIN:
                    drafter = start_drafter(spec, target, [])
                else:
                    drafter = drafters[name]
                    drafter.install(load_file(self._out / "arms" / f"{name}-0" / f"at-{point}.safetensors"))
                # Lookup searches the answers of the recorded stream, as replay does, which knows no salts.
                asked = [replace(p, speculative=name != PLAIN, learn=False, cache_salt=None) for p in prompts]
                queue, source = request_queue(spec, target, asked), TimedRequests()
                log = MetricsLog(self._out / "live" / "metrics.jsonl", name)
                server = embedded_server(spec, target, source, queue.first_prompts(1)[0], drafter, log)
                if name != PLAIN and self._scenario.arms[name].lookup_only:
                    server.policy.shape = _shape(spec, self._scenario.arms[name])
                if server.policy.earlier is not None:
                    add_answers(server.policy.earlier, self._stream("phases", drafter), 0, point)
                stack.callback(server.close)
                servers[name], requests[name] = (server, source), list(iter(queue, None))

            def company(name: str) -> AbstractContextManager[object]:
                return learners[name].running() if name in learners else nullcontext()

            return list(measure_in_turns(servers, requests, live.repeats, company))


def _configuration(spec: RunSpec) -> dict[str, Any]:
    """Return the sections and keys that figures depend on."""
    return {key: value for key, value in plain(spec.config).items() if key not in _NO_FIGURE}


def _origin(spec: RunSpec) -> list[Any]:
    """Return the settings that say which drafter a run starts with."""
    drafts = plain(spec.config.drafter)
    return [drafts[key] for key in ("name", "path", "options", "vocab_size", "trained_for", "feature_layers")]


def _shape(spec: RunSpec, arm: Arm) -> TreeShape:
    return spec.tree.without_drafter(spec.tree.lookup) if arm.lookup_only else spec.tree


def _alone(spec: RunSpec, slots: int, wire: Path) -> RunSpec:
    """Return a spec that serves so many slots, without plain windows, at a wire of its own."""
    config = spec.config
    # Turns repeat their prompts, which are to be read each time.
    engine = replace(config.engine, slots=slots, prefix_cache_tokens=0)
    ends = replace(config.wire, trajectories=f"ipc://{wire}-t", weights=f"ipc://{wire}-w", queue=1)
    return resolve(replace(config, engine=engine, baseline=replace(config.baseline, share=0.0), wire=ends))


def busy_learner(path: str | None, pairs: Sequence[str], folder: Path, layers: Sequence[int]) -> Callable[[], object]:
    """Return the optimizer step of a configuration on recorded requests, to be repeated."""
    spec = resolve(load_config(path, pairs))
    torch.set_num_threads(spec.config.learner.threads)
    target = load(spec)
    drafter = start_drafter(spec, target, [])
    loss, optimizers = learning(spec, drafter, target.parts.head)
    stream, batch_size = RecordedPhase(folder, layers, drafter.feature_layers), spec.config.learner.batch_size
    batch = pack([stream[index % len(stream)] for index in range(batch_size)])
    return lambda: train_step(loss, optimizers, batch, autocast=spec.dtype == torch.bfloat16)


def step_flops(loss: SumLoss, stream: Trajectories, batch_size: int) -> int:
    """Count the floating-point operations of one optimizer step, forward and backward, on the stream's first batch."""
    batch = pack([stream[index] for index in range(min(batch_size, len(stream)))])
    with FlopCounterMode(display=False) as counter:
        out = loss(batch)
        torch.stack([value for key, value in out.items() if key.startswith("loss_")]).sum().backward()
    loss.zero_grad()
    return int(counter.get_total_flops())

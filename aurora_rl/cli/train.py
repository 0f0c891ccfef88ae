"""``aurora-rl train``: learn a drafter offline, from recordings or from chats that are recorded first."""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from tensordict import TensorDict
from torch.utils.data import ConcatDataset, Subset

from aurora_rl.cli import training_data
from aurora_rl.cli.arguments import add_config_arguments, add_resume_argument, pair_of
from aurora_rl.cli.assembly import VOCAB_PROMPTS, check_embedded, load, request_queue, start_drafter, traffic
from aurora_rl.cli.config import Config
from aurora_rl.cli.config.privacy import check_records
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.learner import learning
from aurora_rl.cli.output import plain_console
from aurora_rl.cli.progress import watch
from aurora_rl.cli.ranks import refuse_parallel
from aurora_rl.cli.run_dir import TRAINING, RunDir, go_on
from aurora_rl.cli.signals import Stop
from aurora_rl.cli.spec import RunSpec, resolve
from aurora_rl.cli.train_resume import check_epochs, check_resumed, saved_unless_refused, settle_options
from aurora_rl.collectors.dataset import TrajectoryDataset
from aurora_rl.memory import return_freed_memory
from aurora_rl.policies import Drafter
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.telemetry.loggers import check_installed, logged
from aurora_rl.telemetry.outputs import Outputs
from aurora_rl.telemetry.report import write_summary
from aurora_rl.telemetry.view import every
from aurora_rl.training.offline import OfflineTrainer, replay_groups
from aurora_rl.workload.traffic import Prompt

_SAVE_S = 300.0
_DAY0 = "drafter-day0"


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "--recording",
        action="append",
        type=Path,
        metavar="FOLDER",
        help="folder of trajectories, as learner.recording fills it; may be repeated. Without it the target answers "
        "the chats of traffic.path=chats.jsonl first, and its answers are recorded",
    )
    parser.add_argument("--epochs", type=int, help="passes over what is learned from (4)")
    parser.add_argument(
        "--held-out", type=float, metavar="SHARE", help="last part of each recording, to evaluate on (0.1)"
    )
    add_resume_argument(parser, "its options, at the step of the last training state; lines are appended")
    add_config_arguments(parser, "traffic.path=chats.jsonl")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Record if there is nothing recorded, learn, and leave the drafter. Returns the exit status."""
    refuse_parallel(config, "aurora-rl train")
    settle_options(arguments)
    if arguments.resume is not None:
        config, _ = go_on(config, Path(arguments.resume))
        if (day0 := Path(arguments.resume) / _DAY0).is_dir():  # later weights are in the training state
            config = replace(config, drafter=replace(config.drafter, path=str(day0)))
    check_installed(config.telemetry.logger)
    if not arguments.recording:
        if (
            config.traffic.path is None
            and arguments.resume is None
            and not pair_of("traffic.requests", arguments.overrides)
        ):
            raise ConfigError(
                "nothing to learn from is named; set traffic.path=FILE.jsonl to chats, or --recording FOLDER to what "
                "learner.recording kept (traffic.requests=100 takes that many built-in templates, for a try)"
            )
        check_embedded(config)
    spec, began = resolve(config), time.monotonic()
    if not arguments.recording:
        check_records(config)
    prompts = [] if arguments.recording else training_data.questions(traffic(config))
    data = training_data.fingerprint(arguments.recording or [], prompts)
    if arguments.resume is None:
        folder = RunDir(config, ["config.yaml"], suffix="-train")
    else:
        check_resumed(config, Path(arguments.resume))
        check_epochs(Path(arguments.resume), arguments.epochs, config.learner.batch_size)
        if arguments.data != data:
            named = training_data.sources(arguments.recording or [], config.traffic.path)
            raise ConfigError(
                f"--resume {arguments.resume}: what it learns from ({named}) was changed or reordered since it was "
                "started; restore that, or start in another folder"
            )
        folder = RunDir(config, resume=True)
    arguments.run_dir = folder.path
    with contextlib.closing(folder):
        return _run(spec, arguments, data, prompts, folder, stop, began)


def _run(
    spec: RunSpec,
    arguments: argparse.Namespace,
    data: str,
    prompts: Sequence[Prompt],
    folder: RunDir,
    stop: Stop,
    began: float,
) -> int:
    """Learn in the folder of a run. Returns the exit status."""
    config, run_dir = spec.config, folder.path
    torch.set_num_threads(config.engine.threads)
    console, training = plain_console(), None
    try:
        with contextlib.ExitStack() as loggers:
            with saved_unless_refused(run_dir / TRAINING, arguments, data):
                loggers.enter_context(logged(config.telemetry.logger, run_dir))
                training = _start(spec, arguments, prompts, folder, console, began)
            stop.working = True
            finished = training.run(arguments.epochs, stop)
    except KeyboardInterrupt:
        finished = False
    if finished and training is not None:
        training.report()
    else:
        stop.ignore()
        resume = shlex.join(["aurora-rl", "train", "--resume", str(run_dir)])
        console.print(f"interrupted; {resume} goes on", soft_wrap=True)
    failures = [] if training is None else training.failures()
    for failure in failures:
        print(f"aurora-rl: {failure}", file=sys.stderr)
    return 1 if failures else 0 if finished else 130


# ---- before the first step ---------------------------------------------------------------------------------------


def _start(
    spec: RunSpec,
    arguments: argparse.Namespace,
    prompts: Sequence[Prompt],
    folder: RunDir,
    console: Console,
    began: float,
) -> _Training:
    """Load everything, and record the answers to the prompts that are not recorded yet."""
    folders, run_dir = [Path(each) for each in arguments.recording or []], folder.path
    with folder.undone_if_refused():
        console.print(f"loading {spec.config.model} · run folder {run_dir}", soft_wrap=True)
        target, day0 = load(spec), run_dir / _DAY0
        requests = None if folders else request_queue(spec, target, prompts)
        if requests is None:
            first = training_data.recorded_prompts(folders, VOCAB_PROMPTS)
        else:
            first = requests.first_prompts(VOCAB_PROMPTS)
        drafter = start_drafter(spec, target, first)
        loss, optimizers = learning(spec, drafter, target.parts.head)
        recordings = [training_data.open_recording(each, target, drafter) for each in folders]
        counts = [len(r) for r in recordings] if requests is None else [requests.total - len(requests.failed)]
        count = sum(training_data.num_to_learn(n, arguments.held_out) for n in counts)
        batch_size = spec.config.learner.batch_size
        if count < batch_size:
            fix = f"set learner.batch_size={count}, or give more requests" if count else "give more requests"
            raise ConfigError(
                f"learner.batch_size={batch_size} is more than the {count} requests that are left to learn from: of "
                f"{sum(counts)}, --held-out keeps {sum(counts) - count} to evaluate on; {fix}"
            )
        if not day0.is_dir():
            drafter.save_pretrained(day0)
    if requests is not None:
        answers = run_dir / "recording"
        try:
            recordings = [training_data.record_answers(spec, target, requests, drafter, answers, console)]
        except (ValueError, OSError):
            if answers.is_dir() and len(TrajectoryDataset(answers)):  # a resumed run can go on with them
                raise
            with folder.undone_if_refused():
                raise
    del target
    return_freed_memory(collect=True)
    names = training_data.recording_names(folders) if len(folders) > 1 else [""] * len(folders)
    groups: dict[str, list[int]] = defaultdict(list)
    train: list[int] = []
    start = 0
    for number, recording in enumerate(recordings):
        kept = training_data.num_to_learn(len(recording), arguments.held_out)
        train += range(start, start + kept)
        for index in range(kept, len(recording)):
            name = names[number] if names else prompts[int(recording[index]["request"])].domain
            groups[name].append(start + index)
        start += len(recording)
    every_one: ConcatDataset[TensorDict] = ConcatDataset(recordings)
    trainer = OfflineTrainer(
        drafter.to(spec.device),
        loss,
        optimizers,
        Subset(every_one, train),
        batch_size=spec.config.learner.batch_size,
        autocast=spec.dtype == torch.bfloat16,
        seed=spec.config.seed,
        max_skipped=spec.config.learner.max_skipped,
    )
    training = _Training(
        spec=spec,
        drafter=drafter,
        trainer=trainer,
        held_out={name: Subset(every_one, indices) for name, indices in sorted(groups.items())},
        requests=len(train),
        run_dir=run_dir,
        console=console,
        began=began,
    )
    training.resume()
    return training


# ---- the steps ---------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Training:
    """Steps, evaluations and what they leave in the run's folder."""

    spec: RunSpec
    drafter: Drafter
    trainer: OfflineTrainer
    held_out: dict[str, Subset[TensorDict]]
    requests: int
    run_dir: Path
    console: Console
    began: float

    def __post_init__(self) -> None:
        self._log = MetricsLog(self.run_dir / "metrics.jsonl", "train")
        self._served = self.drafter.serving_copy(self.spec.dtype)
        self._outputs = Outputs(self._log)
        self._first: dict[str, Any] = {}
        self._best: dict[str, Any] = {}
        self._earlier_s = 0.0  # seconds of the processes before this one

    def resume(self) -> None:
        """Go on from the state in the run's folder, if there is one."""
        if not (state := self.run_dir / "learner").is_dir():
            return
        progress = self.trainer.resume(state)
        if progress.get("recorded") != self._recorded():
            raise ConfigError(
                f"--resume {self.run_dir}: it was started on {progress.get('recorded')} requests (to learn from, held "
                f"out), and there are {self._recorded()} now; did a recording grow?"
            )
        self._first, self._best, self._earlier_s = progress["first"], progress["best"], progress.get("seconds", 0.0)
        if self._first and "domains" not in self._first:
            raise ConfigError(
                f"--resume {self.run_dir}: an earlier release began it, whose evaluations are kept in another form; go "
                "on with that release, or start another run from its drafter by drafter.path"
            )

    def _recorded(self) -> list[int]:
        return [self.requests, sum(len(group) for group in self.held_out.values())]

    def run(self, epochs: int, stop: Stop) -> bool:
        """Learn until the epochs are over, which is True, or a signal comes."""
        trainer, total = self.trainer, epochs * self.trainer.batches_per_epoch
        if not self._first:
            self._evaluate()
        save = every(_SAVE_S, self._save)
        with watch(self.console, "learning", total, trainer.batches) as shown:
            while trainer.batches < total and not stop.requested:
                began = time.perf_counter()
                result = trainer.step()
                if result is None:
                    self._log.write("step_skipped", batches=trainer.batches, skipped=trainer.skipped)
                else:
                    loss, out = result
                    objectives = {key: round(float(value.detach().mean()), 4) for key, value in out.items()}
                    seconds = round(time.perf_counter() - began, 3)
                    self._log.write("train", loss=loss, objectives=objectives, batches=trainer.batches, seconds=seconds)
                    shown.tell(trainer.batches, f"loss {loss:.3f}")
                if not trainer.batches % trainer.batches_per_epoch:
                    self._evaluate()
                save()
        if trainer.batches % trainer.batches_per_epoch:
            self._save()
        return trainer.batches >= total

    def _evaluate(self) -> None:
        """Replay the held-out requests, and keep the drafter if it is the best so far."""
        self._served.install(self.drafter.published())
        replays = replay_groups(self._served, self.held_out, self.spec.tree)
        tokens, rounds = (sum(int(getattr(r, name).sum()) for r in replays.values()) for name in ("tokens", "rounds"))
        lengths = {name: found.acceptance_length for name, found in replays.items()}
        found = {"acceptance_length": tokens / rounds, "domains": lengths}
        epoch = self.trainer.batches // self.trainer.batches_per_epoch
        self._log.write("evaluation", epoch=epoch, batches=self.trainer.batches, **found)
        by_group = ", ".join(f"{name or 'none'} {length:.2f}" for name, length in lengths.items())
        count = self._recorded()[1]
        self.console.print(
            f"epoch {epoch}: acceptance length {tokens / rounds:.3f} on {count} held-out request{'s' * (count != 1)}"
            + (f" ({by_group})" if len(lengths) > 1 else ""),
            soft_wrap=True,
        )
        self._first = self._first or found
        better = not self._best or tokens / rounds >= self._best["acceptance_length"]
        if better and self._replace("drafter", lambda: self._served.save_pretrained(self.run_dir / "drafter")):
            self._best = found
        self._save()
        return_freed_memory()

    def _save(self) -> None:
        progress = {"recorded": self._recorded(), "first": self._first, "best": self._best, "seconds": self._seconds}
        self._replace("learner", lambda: self.trainer.save(self.run_dir / "learner", **progress))

    def _replace(self, name: str, write: Callable[[], None]) -> bool:
        """Write an output that makes good for an earlier one that failed. False if it failed."""
        written = self._outputs.write(name, write)
        if written:
            self._outputs.failures.pop(name, None)
        return written

    def failures(self) -> list[str]:
        """Return a line for each output that could not be written."""
        self._outputs.count(self._log)
        return list(self._outputs.failures.values())

    @property
    def _seconds(self) -> float:
        return self._earlier_s + time.monotonic() - self.began

    def report(self) -> None:
        """Write ``summary.json`` and say how to serve the result."""
        first, best = self._first, self._best or self._first
        length = {"first": first["acceptance_length"], "last": best["acceptance_length"]}
        pairs = ["--config", str(self.run_dir / "config.yaml"), f"drafter.path={self.run_dir / 'drafter'}"]
        if self.spec.config.traffic.path is not None:  # clients bring the requests
            pairs.append("traffic.path=null")
        domains = {
            group: {
                "requests": len(stream),
                "acceptance_length": {"first": first["domains"][group], "last": best["domains"][group]},
            }
            for group, stream in self.held_out.items()
        }
        summary = {
            "requests": self.requests,
            "held_out": self._recorded()[1],
            "steps": self.trainer.batches - self.trainer.skipped,
            "skipped": self.trainer.skipped,
            "acceptance_length": length,
            "domains": domains if any(domains) else {},
            "duration_s": self._seconds,
        }
        self._outputs.write("summary.json", lambda: write_summary(self.run_dir, summary))
        text = f"acceptance length {length['first']:.3f} → {length['last']:.3f}"
        if self._best:  # the drafter was written
            text += f"; serve it by\n{shlex.join(['aurora-rl', 'serve', *pairs])}"
        self.console.print(text, soft_wrap=True)

"""``aurora-rl flywheel`` and ``aurora-rl serve``: the serving half of a run, with or without a learner of its own."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from aurora_rl.cli.arguments import add_config_arguments
from aurora_rl.cli.config import Config
from aurora_rl.cli.learner_process import LearnerProcess
from aurora_rl.cli.output import plain_console
from aurora_rl.cli.run_dir import gone_if_refused, new_run_dir, one_line
from aurora_rl.cli.signals import Stop
from aurora_rl.telemetry.log import JsonLines, MetricsLog, MetricsReader
from aurora_rl.telemetry.report import EMPTY_SUMMARY, draw_report, summary_table, write_summary
from aurora_rl.telemetry.view import LiveView, every


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands' arguments."""
    add_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Serve the traffic. Returns the exit status."""
    spawn_learner = arguments.command == "flywheel"
    began, console = time.monotonic(), plain_console()
    run_dir = new_run_dir(config, "config.yaml")
    log = MetricsLog(run_dir / "metrics.jsonl", "server")
    reader = MetricsReader(run_dir / "metrics.jsonl")
    learner: LearnerProcess | None = None
    serving: Any = None
    requests: Any = None
    outputs = _Outputs()
    try:
        import torch

        from aurora_rl.cli import spec
        from aurora_rl.cli.engines import serving as build_serving
        from aurora_rl.memory import return_freed_memory

        torch.set_num_threads(config.engine.threads)
        with gone_if_refused(run_dir):
            prompts = spec.check(config)
            console.print(f"loading {config.model} · run folder {run_dir}", soft_wrap=True)
            target = spec.load(config)
            requests = spec.request_queue(config, target, prompts)
            day0 = run_dir / "drafter-day0" if spawn_learner else None
            drafter, learner_config = spec.first_drafter(config, target, requests, day0)
            if spawn_learner:
                with stop.held():
                    learner = LearnerProcess.start(learner_config, run_dir)
            serving = build_serving(config, target, requests, drafter, log, run_dir)
            del target, drafter  # the engine and its policy have forms of their own
            return_freed_memory(collect=True)
        if learner is not None:
            learner.wait_ready(reader)
        state = f"any at {config.wire.weights}"
        view = LiveView(
            serving, log, reader, total=requests.total, learner=lambda: state if learner is None else learner.state
        )
        stop.working = True
        _decode(serving.server, view, console, stop)
    except KeyboardInterrupt:
        pass
    finally:
        stop.ignore()
        if serving is not None:
            outputs.write("the end of serving", serving.close)
        if learner is not None and (lost := learner.end()):
            outputs.failures.append(lost)
        if stop.working or stop.requested:
            if stop.requested:
                console.print("interrupted")
            summary = dict(EMPTY_SUMMARY, duration_s=time.monotonic() - began)
            if serving is not None:
                summary = serving.server.summary(failed=len(requests.failed), duration_s=time.monotonic() - began)
                outputs.write("drafter", lambda: serving.save_drafter(run_dir))
                for reason in requests.failed:
                    log.write("failed", reason=reason)
                outputs.count(serving.answers)
            outputs.count(log)
            _report(run_dir, summary, serving, console, outputs)
        for failure in outputs.failures:
            print(f"aurora-rl: {failure}", file=sys.stderr)
    return 1 if outputs.failures else 130 if stop.requested else 0


class _Outputs:
    """Writes what a run leaves, each file whatever became of the others.

    Attributes:
        failures: What could not be written, and why.
    """

    def __init__(self) -> None:
        self.failures: list[str] = []

    def write(self, name: str, write: Callable[[], None]) -> None:
        """Write one output; a failure is noted."""
        try:
            write()
        except Exception as error:  # whatever it is, the others are not lost for it
            self.failures.append(f"{name} could not be written: {one_line(error) or repr(error)}")

    def count(self, lines: JsonLines) -> None:
        """Note the lines that a file has lost."""
        if lines.lost:
            self.failures.append(f"{lines.path} lacks {lines.lost} lines that could not be written")


def _report(run_dir: Path, summary: dict[str, Any], serving: Any, console: Console, outputs: _Outputs) -> None:
    finished, rounds = (serving.server.finished, serving.server.rounds) if serving is not None else ([], [])
    events = MetricsReader(run_dir / "metrics.jsonl")
    swaps = [event["requests"] for event in events if event["event"] == "swap"]
    outputs.write("summary.json", lambda: write_summary(run_dir, summary))
    outputs.write("report.png", lambda: draw_report(run_dir / "report.png", finished, rounds, swaps))
    console.print(summary_table(summary))
    names = sorted(path.name for path in run_dir.glob("[a-z]*"))
    console.print(f"written to {run_dir}: {', '.join(names)}", soft_wrap=True)


def _decode(server: Any, view: LiveView, console: Console, stop: Stop) -> None:
    """Round after round until the traffic is served or the user asks for an end."""
    with Live(view.table(), console=console, auto_refresh=False, transient=True) as live:

        def follow() -> None:
            for news in view.follow():
                console.print(news, soft_wrap=True)
            if console.is_terminal:
                live.update(view.table(), refresh=True)

        ticks = [every(1.0, follow), every(5.0, view.log_status)]
        if not console.is_terminal:
            ticks.append(every(15.0, lambda: console.print(view.line(), soft_wrap=True)))
        try:
            while not stop.requested and server.step():
                for tick in ticks:
                    tick()
        except (ValueError, OSError) as error:  # of the program, not of its input: show where
            raise RuntimeError(f"serving stopped: {type(error).__name__}: {one_line(error)}") from error
        view.log_status()

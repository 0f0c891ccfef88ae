"""``aurora-rl flywheel`` and ``aurora-rl serve``: the serving half of a run, with or without a learner of its own."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live

from aurora_rl.cli.arguments import add_config_arguments, add_resume_argument
from aurora_rl.cli.config import Config
from aurora_rl.cli.learner_process import LearnerProcess
from aurora_rl.cli.output import plain_console
from aurora_rl.cli.run_dir import RunDir
from aurora_rl.cli.signals import Stop
from aurora_rl.telemetry.log import JsonLines, MetricsLog, MetricsReader
from aurora_rl.telemetry.outputs import Outputs, one_line
from aurora_rl.telemetry.report import draw_report, summary_table, write_summary
from aurora_rl.telemetry.stats import Stats
from aurora_rl.telemetry.view import LiveView, Server, every

if TYPE_CHECKING:
    from aurora_rl.serving.requests import RequestQueue

_DOCUMENTS = ("config.yaml", "learner.yaml", "summary.json", "report.png")  # that each part of a run writes anew


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands' arguments."""
    add_resume_argument(parser)
    add_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Serve the traffic. Returns the exit status."""
    spawn_learner = arguments.command == "flywheel"
    began, console = time.monotonic(), plain_console()
    folder = RunDir(config, _DOCUMENTS, resume=arguments.resume is not None)
    run_dir = folder.path
    log = MetricsLog(run_dir / "metrics.jsonl", "server")
    reader, events = (MetricsReader(log.path, from_now=True) for _ in range(2))
    learner: LearnerProcess | None = None
    server: Server | None = None
    requests: RequestQueue | None = None
    view: LiveView | None = None
    outputs = Outputs()
    try:
        import torch

        from aurora_rl.cli.assembly import first_drafter, load, request_queue, traffic
        from aurora_rl.cli.engines import build_server
        from aurora_rl.cli.spec import resolve
        from aurora_rl.memory import return_freed_memory

        torch.set_num_threads(config.engine.threads)
        with folder.undone_if_refused():
            spec, prompts = resolve(config), traffic(config)
            console.print(f"loading {config.model} · run folder {run_dir}", soft_wrap=True)
            target = load(spec)
            requests = request_queue(spec, target, prompts)
            day0 = run_dir / "drafter-day0" if spawn_learner else None
            drafter, learner_config = first_drafter(spec, target, requests, day0)
            if spawn_learner:
                with stop.held():
                    learner = LearnerProcess.start(learner_config, run_dir)
            requests.answers = JsonLines(run_dir / "answers.jsonl")
            try:
                server = build_server(spec, target, requests, drafter, log, run_dir, requests.completed)
            except (ValueError, OSError):
                if learner is not None:
                    learner.withdraw()  # before its folder is removed
                raise
            del target, drafter  # the engine and its policy have forms of their own
            return_freed_memory(collect=True)
        if learner is not None:
            learner.wait_ready(reader)
        state = f"any at {config.wire.weights}"
        view = LiveView(
            server, log, reader, total=requests.total, learner=lambda: state if learner is None else learner.state
        )
        stop.working = True
        _decode(server, view, console, stop)
    except KeyboardInterrupt:
        pass
    finally:
        stop.ignore()
        if server is not None:
            outputs.write("the end of serving", server.close)
        if learner is not None and (lost := learner.end()):
            outputs.failures["learner"] = lost
        if view is not None:
            view.read()
        if view is not None and view.unsaved and "learner" not in outputs.failures:  # it died before it could try again
            outputs.failures["learner"] = f"the learner's last training state was not written: {view.unsaved}"
        if stop.working or stop.requested:
            if stop.requested:
                console.print("interrupted")
            stats, dropped = (Stats(), 0) if server is None else (server.stats, server.dropped)
            failed = [] if requests is None else requests.failed
            summary = stats.summary(failed=len(failed), dropped=dropped, duration_s=time.monotonic() - began)
            if server is not None:
                outputs.write("drafter", lambda: server.save_drafter(run_dir / "drafter"))
            if requests is not None and requests.answers is not None:
                outputs.count(requests.answers)
            for reason in failed:
                log.write("failed", reason=reason)
            outputs.count(log)
            _report(run_dir, summary, stats, events, console, outputs)
        for failure in outputs.failures.values():
            print(f"aurora-rl: {failure}", file=sys.stderr)
    return 1 if outputs.failures else 130 if stop.requested else 0


def _report(
    run_dir: Path, summary: dict[str, Any], stats: Stats, events: MetricsReader, console: Console, outputs: Outputs
) -> None:
    swaps = [event["requests"] for event in events if event["event"] == "swap"]
    outputs.write("summary.json", lambda: write_summary(run_dir, summary))
    outputs.write("report.png", lambda: draw_report(run_dir / "report.png", stats.finished, stats.rounds, swaps))
    console.print(summary_table(summary))
    names = sorted(path.name for path in run_dir.glob("[a-z]*"))
    console.print(f"written to {run_dir}: {', '.join(names)}", soft_wrap=True)


def _decode(server: Server, view: LiveView, console: Console, stop: Stop) -> None:
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

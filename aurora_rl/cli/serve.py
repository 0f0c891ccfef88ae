"""``aurora-rl serve`` and ``aurora-rl flywheel``: a server that learns, for clients over HTTP or driven by traffic."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
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
from aurora_rl.telemetry.loggers import check_installed, logged
from aurora_rl.telemetry.outputs import Outputs, one_line
from aurora_rl.telemetry.report import draw_report, summary_table, write_summary
from aurora_rl.telemetry.stats import Stats
from aurora_rl.telemetry.view import LiveView, Server, every

if TYPE_CHECKING:
    from aurora_rl.cli.http import HttpFront
    from aurora_rl.serving.async_engine import AsyncEngine
    from aurora_rl.serving.requests import RequestQueue

_IDLE_S = 0.1  # between two looks of an idle server for new weights
_DOCUMENTS = ("config.yaml", "learner.yaml", "summary.json", "report.png")  # that each part of a run writes anew


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands' arguments."""
    add_resume_argument(parser)
    add_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Serve clients until stopped, or traffic to its end. Returns the exit status."""
    check_installed(config.telemetry.logger)
    replays = arguments.command == "flywheel"
    began, console = time.monotonic(), plain_console()
    folder = RunDir(config, _DOCUMENTS, resume=arguments.resume is not None)
    run_dir = folder.path
    log = MetricsLog(run_dir / "metrics.jsonl", "server")
    reader, events = (MetricsReader(log.path, from_now=True) for _ in range(2))
    learner: LearnerProcess | None = None
    server: Server | None = None
    requests: RequestQueue | None = None
    clients: AsyncEngine | None = None
    http: HttpFront | None = None
    view: LiveView | None = None
    outputs, figures = Outputs(), ExitStack()
    try:
        import torch

        from aurora_rl.cli.assembly import first_drafter, load, request_queue, traffic
        from aurora_rl.cli.engines import embedded_server, sglang_server
        from aurora_rl.cli.http import HttpFront
        from aurora_rl.cli.spec import resolve
        from aurora_rl.memory import return_freed_memory
        from aurora_rl.serving.async_engine import AsyncEngine

        torch.set_num_threads(config.engine.threads)
        with folder.undone_if_refused():
            spec, prompts, http = resolve(config), traffic(config), None if replays else HttpFront.of(config)
            figures.enter_context(logged(config.telemetry.logger, run_dir))
            console.print(f"loading {config.model} · run folder {run_dir}", soft_wrap=True)
            if config.traffic.path and not replays:
                told = (
                    "traffic.path shapes the draft vocabulary alone; aurora-rl flywheel learner.spawn=false serves it"
                )
                console.print(told, soft_wrap=True)
            target = load(spec)
            queue = request_queue(spec, target, prompts)
            day0 = run_dir / "drafter-day0" if config.learner.spawn else None
            drafter, learner_config = first_drafter(spec, target, queue.first_prompts(64), day0)
            if config.learner.spawn:
                with stop.held():
                    learner = LearnerProcess(learner_config, run_dir)
            usual = queue.first_prompts(1)[0]
            if replays:
                requests = queue
                requests.answers = JsonLines(run_dir / "answers.jsonl")
            first_id = queue.total if replays else 0
            clients = AsyncEngine(max_waiting=config.http.max_waiting, workload=requests, first_id=first_id)
            try:
                if config.engine.name == "sglang":
                    server = sglang = sglang_server(spec, target, clients, drafter, log, run_dir)
                    step, address = sglang.step, f"SGLang listens at {sglang.engine.url}"
                else:
                    server = embedded = embedded_server(spec, target, clients, usual, drafter, log)
                    clients.attach(embedded)
                    step, address = clients.step, "" if http is None else f"listening at {http.url}"
            except (ValueError, OSError):
                if learner is not None:
                    learner.withdraw()  # before its folder is removed
                raise
            tokenizer, vocab_size = target.tokenizer, target.parts.config.vocab_size
            del target, drafter  # the engine and its policy have forms of their own
            return_freed_memory(collect=True)
        if learner is not None:
            learner.wait_ready(reader)
        if http is not None:
            http.start(spec, tokenizer, vocab_size, clients, embedded)
        if address:
            console.print(f"{address}/v1", soft_wrap=True)
        state = f"any at {config.wire.weights}"
        view = LiveView(
            server,
            log,
            reader,
            total=None if requests is None else requests.total,
            learner=lambda: state if learner is None else learner.state,
        )
        stop.working = True

        def tend() -> None:
            if learner is not None and learner.tend():
                missed = 0 if server is None else server.missed
                log.write("learner_restarted", restarts=learner.restarts, resumed=learner.resumed, missed=missed)
                resumed = ", from its checkpoint" if learner.resumed else ""
                console.print(f"the learner is started again{resumed}; {missed} trajectories were dropped without one")

        _serve(step, clients, view, tend, console, stop, until_idle=replays)
    except KeyboardInterrupt:
        pass
    finally:
        stop.ignore()
        if clients is not None:
            clients.end("the server is shutting down")
        if http is not None:
            http.stop()
        if server is not None:
            outputs.write("the end of serving", server.close)
        if learner is not None and (lost := learner.end()):
            outputs.failures["learner"] = lost
        figures.close()
        if view is not None:
            view.read()
        if view is not None and view.unsaved and "learner" not in outputs.failures:  # it died before it could try again
            outputs.failures["learner"] = f"the learner's last training state was not written: {view.unsaved}"
        if stop.working or stop.requested:
            if stop.requested and replays:
                console.print("interrupted")
            stats = Stats() if server is None else server.stats
            dropped, missed = (0, 0) if server is None else (server.dropped, server.missed)
            failed, duration_s = [] if requests is None else requests.failed, time.monotonic() - began
            summary = stats.summary(failed=len(failed), dropped=dropped, missed=missed, duration_s=duration_s)
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
    return 1 if outputs.failures else 130 if stop.requested and replays else 0


def _report(
    run_dir: Path, summary: dict[str, Any], stats: Stats, events: MetricsReader, console: Console, outputs: Outputs
) -> None:
    swaps = [event["requests"] for event in events if event["event"] == "swap"]
    outputs.write("summary.json", lambda: write_summary(run_dir, summary))
    outputs.write("report.png", lambda: draw_report(run_dir / "report.png", stats.finished, stats.rounds, swaps))
    console.print(summary_table(summary))
    names = sorted(path.name for path in run_dir.glob("[a-z]*"))
    console.print(f"written to {run_dir}: {', '.join(names)}", soft_wrap=True)


def _serve(
    step: Callable[[], bool],
    clients: AsyncEngine,
    view: LiveView,
    tend: Callable[[], None],
    console: Console,
    stop: Stop,
    *,
    until_idle: bool,
) -> None:
    """Round after round, until the user asks for an end or, if ``until_idle``, all is served."""
    with Live(view.table(), console=console, auto_refresh=False, transient=True) as live:

        def follow() -> None:
            for news in view.follow():
                console.print(news, soft_wrap=True)
            tend()
            if console.is_terminal:
                live.update(view.table(), refresh=True)

        ticks = [every(1.0, follow), every(5.0, view.log_status)]
        if not console.is_terminal:
            ticks.append(every(15.0, lambda: console.print(view.line(), soft_wrap=True)))
        try:
            while not stop.requested:
                if not step():
                    if until_idle:
                        break
                    clients.wait(_IDLE_S)
                for tick in ticks:
                    tick()
        except (ValueError, OSError) as error:  # of the program, not of its input: show where
            raise RuntimeError(f"serving stopped: {type(error).__name__}: {one_line(error)}") from error
        view.log_status()

"""``aurora-rl serve`` and ``aurora-rl flywheel``: a server that learns, for clients over HTTP or driven by traffic."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.live import Live

from aurora_rl.cli.arguments import SAVED_LAST, add_config_arguments, add_end_argument, add_resume_argument
from aurora_rl.cli.config import Config
from aurora_rl.cli.learner_process import LearnerProcess
from aurora_rl.cli.output import plain_console
from aurora_rl.cli.progress import timed_steps
from aurora_rl.cli.ranks import refuse_parallel
from aurora_rl.cli.run_dir import RunDir
from aurora_rl.cli.signals import Stop
from aurora_rl.memory import importing, return_freed_memory
from aurora_rl.remote_engines import REMOTE_ENGINES
from aurora_rl.telemetry.history import RunHistory
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

_DRAIN_S = 5.0  # seconds for the answers to requests that came before the end
_IDLE_S = 0.1  # between two looks of an idle server for new weights
_MAX_TOLD = 20  # failed requests that are printed; metrics.jsonl and answers.jsonl have all
_DOCUMENTS = ("config.yaml", "learner.yaml", "summary.json", "report.png")  # each part of a run writes these anew


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands' arguments."""
    flywheel = parser.prog.endswith(" flywheel")
    add_resume_argument(parser, f"{SAVED_LAST}; its traffic starts anew" if flywheel else SAVED_LAST)
    add_end_argument(parser)
    add_config_arguments(parser)
    if flywheel:  # its traffic is nobody's, and it shows how fast weights are learned
        parser.set_defaults(usual=["canary.share=0"])


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Serve clients until stopped, or traffic to its end. Returns the exit status."""
    if config.learner.spawn:
        refuse_parallel(config, "a server's own learner")
    check_installed(config.telemetry.logger)
    if config.engine.attaches:
        with importing():
            from aurora_rl.cli.remote import served_config

        config = served_config(config)
    session: _Session | None = None
    try:
        with stop.held():  # a folder that was begun gets its summary, however early the user stops
            folder = RunDir(config, _DOCUMENTS, resume=arguments.resume is not None)
            arguments.run_dir = folder.path
            session = _Session(folder, stop, replays=arguments.command == "flywheel")
        session.start()
        session.serve()
    except KeyboardInterrupt:
        pass
    finally:
        status = 130 if session is None else session.end()
    return status


class _Session:
    """A run from its start to its end. It ``replays`` if traffic drives the server, rather than clients."""

    def __init__(self, folder: RunDir, stop: Stop, *, replays: bool) -> None:
        self._config, self._stop, self._replays = folder.config, stop, replays
        self._began, self._console = time.monotonic(), plain_console()
        self._folder, self._run_dir = folder, folder.path
        self._log = MetricsLog(self._run_dir / "metrics.jsonl", "server", self._config.telemetry.max_log)
        self._reader, self._ready = (MetricsReader(self._log.path, from_now=True) for _ in range(2))
        self._history, self._outputs, self._loggers = RunHistory(), Outputs(), ExitStack()
        self._followers: list[Callable[[dict[str, Any]], None]] = []  # get every event of both processes
        # What `start` opens, and `end` closes, however far the start came.
        self._learner: LearnerProcess | None = None
        self._server: Server | None = None
        self._requests: RequestQueue | None = None
        self._clients: AsyncEngine | None = None
        self._http: HttpFront | None = None
        self._view: LiveView | None = None

    def start(self) -> None:
        """Load the target, start the learner and the engine, and begin to listen."""
        with timed_steps(self._console) as step:
            address = self._open(step)
        if address:
            self._console.print(address, soft_wrap=True)

    def _open(self, step: Callable[[str], None]) -> str:
        """Open what a run needs, step by step; return the line that says where clients are answered."""
        with importing():
            import torch

            from aurora_rl.cli import assembly
            from aurora_rl.cli.config.canary import compared
            from aurora_rl.cli.embedded import embedded_server
            from aurora_rl.cli.http import HttpFront
            from aurora_rl.cli.remote import remote_server
            from aurora_rl.cli.spec import resolve
            from aurora_rl.collectors.keys import engine_keys
            from aurora_rl.serving.async_engine import AsyncEngine
            from aurora_rl.workload.traffic import unseen_from

        config, run_dir, say = self._config, self._run_dir, partial(self._console.print, soft_wrap=True)
        torch.set_num_threads(config.engine.threads)
        with self._folder.undone_if_refused():
            attached = config.engine.attaches and not self._replays  # the clients are there, too
            (spec, *second_spec), prompts = map(resolve, compared(config)), [] if attached else assembly.traffic(config)
            assembly.wire_keys(config, engine_keys)  # raises before a model is loaded
            http = self._http = HttpFront.of(config, replays=self._replays)
            self._loggers.enter_context(logged(config.telemetry.logger, run_dir))
            say(f"loading {config.model} · run folder {run_dir}")
            if config.traffic.path and not self._replays:
                say("traffic.path shapes the draft vocabulary alone; aurora-rl flywheel learner.spawn=false serves it")
            step("model")
            target = assembly.load(replace(spec, device=torch.device("cpu")) if config.engine.attaches else spec)
            length, default = assembly.slot_length(config, target), assembly.USUAL_LENGTH
            if length < default and config.engine.max_length is None:
                say(f"engine.max_length={length}, the context of {config.model}; the default is {default}")
            first_id, built_in = 0, self._replays and config.traffic.path is None
            if self._replays:
                queue = self._requests = assembly.request_queue(spec, target, prompts)
                first_id = queue.total  # clients' requests are numbered from here on
                firsts = queue.first_prompts(assembly.VOCAB_PROMPTS)
            else:
                firsts = assembly.encoded_prompts(target, prompts[: assembly.VOCAB_PROMPTS])
            step("drafter")
            day0 = run_dir / "drafter-day0" if config.learner.spawn else None
            drafter, learner_config = assembly.first_drafter(spec, target, firsts, day0)
            second_drafter = [(each, assembly.start_drafter(each, target, firsts)) for each in second_spec]
            # Not earlier: a run that is refused while it loads leaves no event. Not later: the learner writes its own.
            self._log.write("begin", traffic=first_id, unseen=unseen_from(len(prompts)) if built_in else None)
            if second_drafter:
                self._log.write("compare", drafters=list(config.compare))
            if config.learner.spawn:
                with self._stop.held():
                    self._learner = LearnerProcess(learner_config, run_dir)
            if self._requests is not None and not config.privacy.zero_retention:
                self._requests.write_answers(JsonLines(run_dir / "answers.jsonl"))
            clients = self._clients = AsyncEngine(
                max_waiting=config.http.max_waiting, workload=self._requests, first_id=first_id
            )
            step("engine")
            try:
                if config.engine.remote:
                    source = clients if self._replays else None
                    self._server = remote = remote_server(spec, target, source, drafter, self._log, run_dir)
                    self._step, engine = remote.step, REMOTE_ENGINES[config.engine.name]
                    address = f"{engine} listens at {remote.client.url}/v1"
                else:
                    usual = firsts[0] if firsts else [0, 0]
                    self._server = embedded = embedded_server(
                        spec, target, clients, usual, drafter, self._log, *second_drafter
                    )
                    clients.attach(embedded)
                    self._step, address = clients.step, ""
            except (ValueError, OSError):
                if self._learner is not None:
                    self._learner.withdraw()  # before its folder is removed
                raise
            tokenizer, vocab_size = target.tokenizer, target.parts.config.vocab_size
            del target, drafter  # the engine and its policy have forms of their own
            return_freed_memory(collect=True)
        if self._learner is not None:
            step("learner")
            self._learner.wait_ready(self._ready)
        if http is not None:
            if config.engine.remote:
                http.start_proxy(spec, remote, self._history)
            else:
                http.start(spec, tokenizer, vocab_size, clients, embedded, self._history)
            self._followers.append(http.metrics.follow)
            address = f"listening at {http.url}/v1 · live page at {http.url}/"
        return address

    def serve(self) -> None:
        """Go round after round, until the user asks for an end or the traffic is served. Clients' answers end then."""
        server, clients, requests = self._server, self._clients, self._requests
        console, stop = self._console, self._stop
        assert server is not None and clients is not None, "call start first"
        view = self._view = LiveView(
            server,
            self._log,
            self._reader,
            self._history,
            traffic=self._requests,
            learner=self._learner_state,
            clients=dict if self._http is None else self._http.clients,
            followers=self._followers,
        )
        stop.working = True
        with Live(view.table(), console=console, auto_refresh=False, transient=not console.is_terminal) as live:

            def follow() -> None:
                for news in view.follow():
                    console.print(news, soft_wrap=True)
                self._tend_learner()
                if console.is_terminal:
                    live.update(view.table(), refresh=True)

            def print_news() -> None:
                if line := view.news():
                    console.print(line, soft_wrap=True)

            ticks = [every(1.0, follow), every(5.0, view.log_status)]
            if not console.is_terminal:
                ticks.append(every(15.0, print_news))
            try:
                while not (stop.requested or (requests is not None and requests.done)):
                    if not self._step():
                        if requests is not None or self._http is None:  # no client is to come
                            break
                        clients.wait(_IDLE_S)
                    for tick in ticks:
                        tick()
                self._drain(clients)
            except Exception as error:
                clients.end("a fault has ended the engine; the server's log says which")
                if isinstance(error, ValueError | OSError):  # the program's fault, not its input's: show where
                    raise RuntimeError(f"serving stopped: {type(error).__name__}: {one_line(error)}") from error
                raise
            view.log_status()
            live.update(view.table())  # a terminal keeps the last state on its screen

    def _drain(self, clients: AsyncEngine) -> None:
        """Complete what clients have asked, for a few seconds, and take nothing new."""
        clients.close()
        deadline = time.monotonic() + _DRAIN_S
        while clients.num_open and time.monotonic() < deadline:
            self._step()

    def _learner_state(self) -> str:
        if self._config.compare:
            return "none"
        return f"any at {self._config.wire.weights}" if self._learner is None else self._learner.state

    def _tend_learner(self) -> None:
        """Start a learner that died again, once it is due."""
        learner, server = self._learner, self._server
        if learner is not None and server is not None and learner.tend():
            missed, lost = server.drops["no_learner"], self._history.unsaved(server.sent)
            self._log.write(
                "learner_restarted", restarts=learner.restarts, resumed=learner.resumed, missed=missed, lost=lost
            )
            resumed = ", from its training state" if learner.resumed else ""
            self._console.print(
                f"the learner is started again{resumed}; {missed} trajectories were dropped without one, "
                f"and {lost} were lost with the last",
                soft_wrap=True,
            )

    def end(self) -> int:
        """Close what was opened and write what the run came to. Returns the exit status."""
        stop, outputs, view, server = self._stop, self._outputs, self._view, self._server
        stop.ignore()
        if self._clients is not None:
            self._clients.end()
        if self._http is not None:
            self._http.stop()
        if server is not None:
            outputs.write("the end of serving", server.close)
        if self._learner is not None and (lost := self._learner.end()):
            outputs.failures["learner"] = lost
        self._loggers.close()
        if view is not None:
            view.read()
        if view is not None and view.unsaved and "learner" not in outputs.failures:  # it died before it could try again
            outputs.failures["learner"] = f"the learner's last training state was not written: {view.unsaved}"
        interrupted = stop.requested and self._replays
        if stop.working or stop.requested:
            if interrupted:
                self._console.print("interrupted")
            self._report()
        for failure in outputs.failures.values():
            print(f"aurora-rl: {failure}", file=sys.stderr)
        self._folder.close()
        return 1 if outputs.failures else 130 if interrupted else 0

    def _report(self) -> None:
        server, requests, outputs, run_dir = self._server, self._requests, self._outputs, self._run_dir
        stats = Stats() if server is None else server.stats
        drops = self._history.drops if server is None else server.drops + self._history.drops
        failed, answered = ([], 0) if requests is None else (requests.failed, requests.answered)
        summary = stats.summary(
            client_requests=len(stats.finished) - answered,
            failed=len(failed),
            drops=drops,
            duration_s=time.monotonic() - self._began,
        )
        if server is not None:
            outputs.write("drafter", lambda: server.save_drafter(run_dir / "drafter"))
        if requests is not None and requests.answers is not None:
            outputs.count(requests.answers)
        for reason in failed:
            self._log.write("failed", reason=reason)
        for reason in list(dict.fromkeys(failed))[:_MAX_TOLD]:  # the later turns fail for the same reason
            self._console.print(f"failed: {reason}", soft_wrap=True)
        outputs.count(self._log)
        outputs.write("summary.json", lambda: write_summary(run_dir, summary))
        outputs.write("report.png", lambda: draw_report(run_dir / "report.png", self._history))
        self._console.print(summary_table(summary))
        names = sorted(path.name for path in run_dir.glob("[a-z]*"))
        self._console.print(f"written to {run_dir}: {', '.join(names)}", soft_wrap=True)

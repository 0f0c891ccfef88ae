"""The command line: ``aurora-rl flywheel | serve | learn``."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from aurora_rl.config import Config, ConfigError, load_config, to_yaml
from aurora_rl.metrics import MetricsLog, MetricsReader
from aurora_rl.report import EMPTY_SUMMARY, draw_report, summary_table, write_summary

_HELP = {
    "flywheel": "serve traffic, learn from it in a second process, and swap the drafter while serving",
    "serve": "the serving half: needs a learner at wire.* to improve, and serves without one",
    "learn": "the training half: waits for a server's trajectories until it is interrupted",
}
_READY_S = 300.0


class _Stop:
    """Turns the first SIGINT or SIGTERM into a flag that loops look at; a second one interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        """Raise KeyboardInterrupt if the user asked for an end; for the stages before serving."""
        if self.requested:
            raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``aurora-rl``; returns the exit status."""
    parser = argparse.ArgumentParser(prog="aurora-rl", description="Speculative decoding that learns while it serves.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", metavar="FILE", help="YAML file with any of the keys")
        command.add_argument("--print-config", action="store_true", help="print the resulting configuration and end")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example engine.slots=1")
    arguments = parser.parse_args(argv)
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        return {"flywheel": _flywheel, "serve": _serve, "learn": _learn}[arguments.command](config)
    except (ValueError, OSError) as error:
        print(f"aurora-rl: {error}", file=sys.stderr)
        return 2


def _run_dir(config: Config) -> Path:
    folder = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir={str(folder)!r} cannot be made: {error}") from error
    config.run_dir = str(folder)
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


# ---- learn ----------------------------------------------------------------------------------------------------------


def _learn(config: Config) -> int:
    import torch

    from aurora_rl.build import learner as build_learner

    stop = _Stop()
    torch.set_num_threads(config.learner.threads)
    run_dir = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}-learner")
    log = MetricsLog(run_dir / "metrics.jsonl", "learner")
    parent = os.getppid()
    learner = build_learner(config, log, run_dir)
    log.write("learner_ready", pid=os.getpid())
    print(f"learning; metrics and checkpoints in {run_dir}", flush=True)
    # A child whose parent is gone has nobody to learn for; on a terminal the parent is the shell.
    while not stop.requested and os.getppid() == parent:
        learner.step()
    learner.save()
    learner.close()
    log.write("learner_done", seen=learner.seen, steps=learner.steps, version=learner.version)
    return 0


# ---- serve and flywheel ---------------------------------------------------------------------------------------------


def _serve(config: Config) -> int:
    return _run(config, spawn_learner=False)


def _flywheel(config: Config) -> int:
    return _run(config, spawn_learner=True)


def _run(config: Config, *, spawn_learner: bool) -> int:
    """Serve the traffic, with a learner of our own or with whichever is at the other end of the wire."""
    stop, began = _Stop(), time.monotonic()
    console = Console(stderr=False)
    run_dir = _run_dir(config)
    log = MetricsLog(run_dir / "metrics.jsonl", "server")
    child: subprocess.Popen | None = None
    serving: Any = None
    requests: Any = None
    try:
        import torch

        from aurora_rl import build
        from aurora_rl.policies.formats import save_eagle3

        torch.set_num_threads(config.engine.threads)
        console.print(f"loading {config.model} · run folder {run_dir}")
        target = build.load(config)
        stop.check()
        requests = build.conversations(config, target)
        made = build.drafter(config, target.parts, requests.first_prompts(64))
        if spawn_learner:
            if config.drafter.path is None and config.drafter.name == "eagle3":
                # Both halves start from one drafter, whose draft vocabulary has seen the first prompts.
                save_eagle3(made, run_dir / "drafter-day0")
                config.drafter.path = str(run_dir / "drafter-day0")
            child = _spawn(config, run_dir)
        serving = build.Serving(config, target, requests, made, log)
        log.write("costs", seconds_by_depth=serving.costs)
        if child is not None:
            _await_learner(child, run_dir, stop)
        stop.check()
        _decode(serving, requests.total, child, run_dir, console, stop)
    except KeyboardInterrupt:
        console.print("interrupted while starting")
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what follows is short and must be whole
        if serving is not None:
            serving.close()
        if child is not None:
            _end(child)
    summary = dict(EMPTY_SUMMARY, duration_s=time.monotonic() - began)
    finished, rounds = [], []
    if serving is not None:
        server = serving.server
        summary = server.summary(failed=len(requests.failed), duration_s=time.monotonic() - began)
        finished, rounds = server.finished, server.rounds
        if config.drafter.name == "eagle3":
            save_eagle3(server.policy.drafter, run_dir / "drafter")
        for reason in requests.failed:
            log.write("failed", reason=reason)
    swaps = [event["requests"] for event in MetricsReader(run_dir / "metrics.jsonl").new() if event["event"] == "swap"]
    write_summary(run_dir, summary)
    draw_report(run_dir / "report.png", finished, rounds, swaps)
    console.print(summary_table(summary))
    console.print(f"written to {run_dir}: summary.json, metrics.jsonl, report.png, drafter/, config.yaml")
    return 130 if stop.requested else 0


def _spawn(config: Config, run_dir: Path) -> subprocess.Popen:
    """Start the learner in a session of its own, so that Ctrl-C reaches it through us, in order."""
    path = run_dir / "learner.yaml"
    path.write_text(to_yaml(config))
    output = open(run_dir / "learner.log", "wb")
    with output:
        return subprocess.Popen(
            [sys.executable, "-m", "aurora_rl.cli", "learn", "--config", str(path)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
        )


def _await_learner(child: subprocess.Popen, run_dir: Path, stop: _Stop) -> None:
    """Wait until the learner listens, so that what is wrong with it is told before any work is done."""
    reader, deadline = MetricsReader(run_dir / "metrics.jsonl"), time.monotonic() + _READY_S
    while not any(event["event"] == "learner_ready" for event in reader.new()):
        stop.check()
        if child.poll() is not None or time.monotonic() > deadline:
            lines = (run_dir / "learner.log").read_text(errors="replace").strip().splitlines()
            raise ConfigError(f"the learner did not start: {lines[-1] if lines else f'exit {child.returncode}'}")
        time.sleep(0.05)


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=60)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _decode(
    serving: Any, total: int, child: subprocess.Popen | None, run_dir: Path, console: Console, stop: _Stop
) -> None:
    """Round after round until the traffic is served or the user asks for an end."""
    server, view = serving.server, _View(run_dir, serving, total, child)
    with Live(view.table(), console=console, auto_refresh=False, transient=True) as live:
        show = _every(1.0, lambda: live.update(view.table(), refresh=True))
        tell = _every(15.0, lambda: console.print(view.line()))
        report = show if console.is_terminal else tell
        while not stop.requested and server.step():
            report()


def _every(seconds: float, action: Callable[[], None]) -> Callable[[], None]:
    """A function that runs ``action`` when called, but not more often than this."""
    due = time.monotonic() + seconds

    def maybe() -> None:
        nonlocal due
        if time.monotonic() >= due:
            action()
            due = time.monotonic() + seconds

    return maybe


class _View:
    """The live view: what the server knows, and what the learner has written."""

    def __init__(self, run_dir: Path, serving: Any, total: int, child: subprocess.Popen | None) -> None:
        self._reader, self._serving = MetricsReader(run_dir / "metrics.jsonl"), serving
        self._total, self._child = total, child
        self._loss: float | None = None
        self._gate: dict[str, Any] | None = None

    def _rows(self) -> list[tuple[str, str]]:
        for event in self._reader.new():
            if event["event"] == "train":
                self._loss = event["loss"]
            elif event["event"] == "gate":
                self._gate = event
        server = self._serving.server
        count = len(server.finished)
        recent = server.acceptance(max(count - max(count // 10, 8), 0), count) if count else None
        speed = server.rates(0.25)

        def show(value: float | None, digits: int = 2) -> str:
            return "–" if value is None else f"{value:.{digits}f}"

        gate = self._gate and f"{self._gate['difference']:+.3f} {'published' if self._gate['publish'] else 'refused'}"
        learner = "none" if self._child is None else "running" if self._child.poll() is None else "DEAD, still serving"
        return [
            ("requests", f"{count}/{self._total}"),
            ("acceptance length", f"{show(recent)} at depth {server.policy.shape.depth}"),
            ("tokens/s plain · speculative", f"{show(speed.control, 1)} · {show(speed.speculative, 1)}"),
            ("speedup", show(speed.speedup)),
            ("version · swaps", f"{server.policy.version} · {len(server.swap_ms)}"),
            ("queue", str(self._serving.queued)),
            ("learner", self._serving.refused or learner),
            ("learner loss", show(self._loss, 3)),
            ("gate", gate or "–"),
        ]

    def table(self) -> Table:
        """The view of a terminal."""
        table = Table(show_header=False, title="aurora-rl")
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def line(self) -> str:
        """The view where output is not a terminal."""
        return " | ".join(f"{name} {value}" for name, value in self._rows())


if __name__ == "__main__":
    sys.exit(main())

"""The command line: ``aurora-rl flywheel | serve | learn | check | bench | export``."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from aurora_rl.config import Config, ConfigError, load_config, to_yaml
from aurora_rl.live import LiveView, every
from aurora_rl.metrics import MetricsLog, MetricsReader
from aurora_rl.report import EMPTY_SUMMARY, draw_report, summary_table, write_summary

_HELP = {
    "flywheel": "serve traffic, learn from it in a second process, and swap the drafter while serving",
    "serve": "the serving half: needs a learner at wire.* to improve, and serves without one",
    "learn": "the training half: waits for a server's trajectories until it is interrupted",
    "check": "whether the model is served exactly, which drafters start, memory and round times; starts nothing",
}
_READY_S = 300.0
_END_S = 60.0


class _Stop:
    """What SIGINT and SIGTERM do.

    While a command starts they raise KeyboardInterrupt. Once it works, the first is a flag that loops look at, so that
    a round or a step ends whole, and a second one raises. However many come, one exception is raised.

    Attributes:
        requested: whether the user asked for an end.
        working: set by the command when it has started.
    """

    def __init__(self) -> None:
        self.requested, self.working = False, False
        self._raised, self._held = False, False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """From here on they do nothing, up to the end of the process: what is left is short and must be whole."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if (again or not self.working) and not self._held:
            self._raise()

    def _raise(self) -> None:
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Raise behind this block and not inside: a child process whose handle is lost could not be ended."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.requested:
            self._raise()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``aurora-rl``; returns the exit status: 0, 2 for an error of the user's, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="aurora-rl", description="Speculative decoding that learns while it serves.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in _HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--config", metavar="FILE", help="YAML file with any of the keys")
        command.add_argument("--print-config", action="store_true", help="print the resulting configuration and end")
        command.add_argument("--parent", type=int, help=argparse.SUPPRESS)  # the flywheel that a learner belongs to
        command.add_argument("overrides", nargs="*", metavar="key=value", help="for example engine.slots=1")
    bench = commands.add_parser("bench", help="measurements on recordings, resumable run by run")
    text = "learn from one recorded stream by several objectives, and compare on what is still to come"
    _add_bench(bench.add_subparsers(dest="what", required=True).add_parser("objectives", help=text, description=text))
    text = "write a drafter as an engine loads it"
    _add_export(commands.add_parser("export", help=text, description=text))
    arguments = parser.parse_args(argv)
    # Server and learner share the cores. OpenMP's threads spin between parallel regions unless told not to, and hold
    # the core that the other process waits for; read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    stop = _Stop()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        if arguments.command == "learn":
            return _learn(config, stop, arguments.parent)
        if arguments.command == "check":
            return _check(config)
        if arguments.command == "bench":
            return _bench(config, arguments)
        if arguments.command == "export":
            return _export(config, arguments)
        return _run(config, stop, spawn_learner=arguments.command == "flywheel")
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"aurora-rl: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    return " ".join(text.split())


def _run_dir(config: Config, document: str, *, suffix: str = "") -> Path:
    folder = Path(config.run_dir or f"runs/{time.strftime('%Y%m%d-%H%M%S')}{suffix}")
    config.run_dir = str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / document).write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(f"run_dir={str(folder)!r} cannot be used: {error.strerror}") from error
    return folder


# ---- check ----------------------------------------------------------------------------------------------------------


def _check(config: Config) -> int:
    import torch

    from aurora_rl.check import check_model

    torch.set_num_threads(config.engine.threads)
    return 0 if check_model(config) else 1


# ---- bench ----------------------------------------------------------------------------------------------------------


def _add_bench(command: argparse.ArgumentParser) -> None:
    command.add_argument("--recording", type=Path, required=True, help="folder that learner.record=... filled")
    command.add_argument("--out", type=Path, default=Path("runs/objectives"), help="folder of the results")
    command.add_argument("--variants", default="forward_kl,discard", help="names; configured is objectives=...")
    command.add_argument("--seeds", type=int, default=1, help="runs of each variant")
    command.add_argument("--every", type=int, default=40, help="requests between two evaluations")
    command.add_argument("--ahead", type=int, default=40, help="requests of an evaluation: the next to come")
    command.add_argument("--limit", type=int, help="most requests of the recording")
    command.add_argument("--config", metavar="FILE", help="YAML file with any of the keys")
    command.add_argument("--print-config", action="store_true", help="print the resulting configuration and end")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="for example learner.replay=4")


def _bench(config: Config, arguments: argparse.Namespace) -> int:
    _limit_caches()

    import torch

    from aurora_rl.bench import bench_objectives

    torch.set_num_threads(config.learner.threads)
    bench_objectives(
        config,
        arguments.recording,
        arguments.out,
        variants=[name.strip() for name in arguments.variants.split(",")],
        seeds=arguments.seeds,
        every=arguments.every,
        ahead=arguments.ahead,
        limit=arguments.limit,
        say=lambda line: print(line, flush=True),
    )
    return 0


# ---- export ---------------------------------------------------------------------------------------------------------


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("--drafter", required=True, help="folder such as RUN_DIR/drafter, or hub id")
    command.add_argument("--out", type=Path, required=True, help="folder to write; a drafter in it is replaced")
    command.add_argument("--to", required=True, help="sglang, vllm, hf (its authors' own), or another of its formats")
    command.add_argument("--from", dest="layout", help="layout of what is read; the one of run folders by default")
    command.add_argument("--config", metavar="FILE", help="YAML file with any of the keys")
    command.add_argument("--print-config", action="store_true", help="print the resulting configuration and end")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="the target: model=..., dtype=...")


def _export(config: Config, arguments: argparse.Namespace) -> int:
    from aurora_rl import build
    from aurora_rl.policies import get_drafter, load_drafter, save_drafter

    # Sizes and positions are checked against the target, and written as the target has them.
    target = build.load(config)
    settings = config.drafter
    # Drafters that have names recognize their folders. Of others only the user may say what is imported.
    name = str(settings.options.get("learned", settings.name))
    kind = get_drafter(settings.name) if ":" in name else None
    drafter = load_drafter(
        arguments.drafter,
        target.parts,
        kind,
        layout=arguments.layout,
        options=settings.options,
        made_for=settings.made_for,
    )
    save_drafter(drafter.to(build.dtype_of(config)), arguments.out.resolve(), arguments.to)
    print(f"{type(drafter).__name__} for {config.model} written to {arguments.out} ({arguments.to})")
    return 0


# ---- learn ----------------------------------------------------------------------------------------------------------


def _learn(config: Config, stop: _Stop, parent: int | None) -> int:
    os.nice(config.learner.nice)  # before the model is loaded: the server times its rounds meanwhile
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    run_dir = _run_dir(config, "learner.yaml", suffix="-learner")
    log = MetricsLog(run_dir / "metrics.jsonl", "learner")
    _limit_caches()

    import torch

    from aurora_rl import build

    torch.set_num_threads(config.learner.threads)
    learner = build.learner(config, log, run_dir)
    stop.working = True
    log.write("learner_ready", pid=os.getpid())
    print(f"learning; metrics and checkpoints in {run_dir}", flush=True)
    try:
        while not stop.requested:
            learner.step()
        stop.ignore()
        learner.save()
    finally:
        learner.close()
    log.write("learner_done", seen=learner.seen, steps=learner.steps, version=learner.version)
    return 0


def _limit_caches() -> None:
    """Before torch is loaded in a process that learns.

    No two batches have the same number of rows, and oneDNN keeps a kernel with its scratch memory for each of the last
    1,024 shapes, twice over: 20 MB a request, 11 GB after 460.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")


def _end_with(parent: int) -> None:
    """End this process in good order once the flywheel that started it is gone, however it went."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGTERM)


# ---- serve and flywheel ---------------------------------------------------------------------------------------------


def _run(config: Config, stop: _Stop, *, spawn_learner: bool) -> int:
    """Serve the traffic, with a learner of our own or with whichever is at the other end of the wire."""
    began, console = time.monotonic(), Console()
    run_dir = _run_dir(config, "config.yaml")
    log = MetricsLog(run_dir / "metrics.jsonl", "server")
    # Two readers of what this run adds: the folder may hold an earlier run's events.
    reader, events = (MetricsReader(run_dir / "metrics.jsonl", at_end=True) for _ in range(2))
    child: subprocess.Popen | None = None
    serving: Any = None
    requests: Any = None
    try:
        import torch

        from aurora_rl import build
        from aurora_rl.serving import serving as build_serving

        torch.set_num_threads(config.engine.threads)
        prompts = build.check(config)
        console.print(f"loading {config.model} · run folder {run_dir}")
        target = build.load(config)
        requests = build.conversations(config, target, prompts)
        day0 = run_dir / "drafter-day0" if spawn_learner else None
        made, theirs = build.first_drafter(config, target, requests, day0)
        if spawn_learner:
            with stop.held():
                child = _spawn(theirs, run_dir)
        serving = build_serving(config, target, requests, made, log, run_dir)
        if child is not None:
            _await_learner(child, run_dir, reader)
        view = LiveView(
            serving, log, reader, total=requests.total, learner=lambda: _learner_state(child, run_dir, config)
        )
        stop.working = True
        _decode(serving.server, view, console, stop)
    except KeyboardInterrupt:
        pass
    finally:
        stop.ignore()
        try:
            if serving is not None:
                serving.close()
        finally:
            if child is not None:
                _end(child)
        if stop.working or stop.requested:
            if stop.requested:
                console.print("interrupted")
            summary = dict(EMPTY_SUMMARY, duration_s=time.monotonic() - began)
            if serving is not None:
                summary = serving.server.summary(failed=len(requests.failed), duration_s=time.monotonic() - began)
                serving.save_drafter(run_dir)
                for reason in requests.failed:
                    log.write("failed", reason=reason)
            _report(run_dir, summary, serving, events, console)
    return 130 if stop.requested else 0


def _report(run_dir: Path, summary: dict[str, Any], serving: Any, events: MetricsReader, console: Console) -> None:
    finished, rounds = (serving.server.finished, serving.server.rounds) if serving is not None else ([], [])
    swaps = [event["requests"] for event in events.new() if event["event"] == "swap"]
    write_summary(run_dir, summary)
    draw_report(run_dir / "report.png", finished, rounds, swaps)
    console.print(summary_table(summary))
    console.print(f"written to {run_dir}: {', '.join(sorted(path.name for path in run_dir.glob('[a-z]*')))}")


def _spawn(config: Config, run_dir: Path) -> subprocess.Popen:
    """Start the learner in a session of its own, so that Ctrl-C reaches it through us, in order."""
    path = run_dir / "learner.yaml"
    path.write_text(to_yaml(config))
    with open(run_dir / "learner.log", "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "aurora_rl.cli", "learn", "--config", str(path), "--parent", str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _last_line(run_dir: Path) -> str:
    lines = (run_dir / "learner.log").read_text(errors="replace").strip().splitlines()
    return lines[-1].removeprefix("aurora-rl: ") if lines else "it said nothing"


def _await_learner(child: subprocess.Popen, run_dir: Path, reader: MetricsReader) -> None:
    """Wait until the learner listens, so that what is wrong with it is told before any work is done."""
    deadline = time.monotonic() + _READY_S
    while not any(event["event"] == "learner_ready" for event in reader.new()):
        if child.poll() is not None or time.monotonic() > deadline:
            raise ConfigError(f"the learner did not start: {_last_line(run_dir)}")
        time.sleep(0.05)


def _learner_state(child: subprocess.Popen | None, run_dir: Path, config: Config) -> str:
    if child is None:
        return f"any at {config.wire.weights}"
    if child.poll() is None:
        return "running"
    return f"died with status {child.returncode}, serving goes on; see {run_dir / 'learner.log'}"


def _end(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(timeout=_END_S)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _decode(server: Any, view: LiveView, console: Console, stop: _Stop) -> None:
    """Round after round until the traffic is served or the user asks for an end."""
    with Live(view.table(), console=console, auto_refresh=False, transient=True) as live:

        def follow() -> None:
            for news in view.follow():
                console.print(news)
            if console.is_terminal:
                live.update(view.table(), refresh=True)

        ticks = [every(1.0, follow), every(5.0, view.log_status)]
        if not console.is_terminal:
            ticks.append(every(15.0, lambda: console.print(view.line())))
        try:
            while not stop.requested and server.step():
                for tick in ticks:
                    tick()
        except (ValueError, OSError) as error:  # of the program, not of its input: show where
            raise RuntimeError("serving stopped") from error
        view.log_status()


if __name__ == "__main__":
    sys.exit(main())

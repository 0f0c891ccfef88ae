"""The command line: ``aurora-rl flywheel | serve | learn | check | bench | export``."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.live import Live

from aurora_rl.cli.config import Config, ConfigError, load_config, nearest_key, to_yaml
from aurora_rl.cli.output import SafeStream, plain_console
from aurora_rl.telemetry.log import JsonLines, MetricsLog, MetricsReader
from aurora_rl.telemetry.report import EMPTY_SUMMARY, draw_report, summary_table, write_summary
from aurora_rl.telemetry.view import LiveView, every

_HELP = {
    "flywheel": "serve traffic, learn from it in a second process, and swap the drafter while serving",
    "serve": "the serving half: needs a learner at wire.* to improve, and serves without one",
    "learn": "the training half: waits for a server's trajectories until it is interrupted",
    "check": "whether the model is served exactly, which drafters start, memory and round times; starts nothing",
}
_READY_S = 300.0
_END_S = 60.0


class _Stop:
    """What SIGINT, SIGTERM and SIGHUP do.

    While a command starts they raise KeyboardInterrupt. Once it works, the first is a flag that loops look at, so that
    a round or a step ends whole, and a second one raises. However many come, one exception is raised.

    Attributes:
        requested: whether the user asked for an end.
        working: set by the command when it has started.
    """

    def __init__(self) -> None:
        self.requested, self.working = False, False
        self._raised, self._held = False, False
        self._numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            self._numbers.append(signal.SIGHUP)
        for number in self._numbers:
            signal.signal(number, self._note)

    def ignore(self) -> None:
        """From here on they do nothing, up to the end of the process: what is left is short and must be whole."""
        for number in self._numbers:
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
    """Run ``aurora-rl``.

    Returns:
        The exit status: 0; 1 where something failed that is not the user's, or an output of the run could not be
        written; 2 for an error of the user's; 130 if interrupted.
    """
    # A stream that was closed before we began, as by >&-, is None. These take its place and its descriptor: C libraries
    # write to that, and a file of the run must not get it.
    with (
        open(os.devnull, "w", encoding="utf-8") as no_output,
        open(os.devnull, "w", encoding="utf-8") as no_errors,
        contextlib.redirect_stdout(SafeStream(sys.stdout or no_output)),
        contextlib.redirect_stderr(SafeStream(sys.stderr or no_errors)),
    ):
        return _main(argv)


def _main(argv: Sequence[str] | None) -> int:
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
    arguments, unknown = parser.parse_known_args(argv)
    if unknown and not unknown[0].startswith("-"):
        parser.error(f"unrecognized argument {unknown[0]}; put all key=value pairs next to each other")
    if unknown:  # --slots 2
        words = list(sys.argv[1:] if argv is None else argv)
        option, _, value = unknown[0].partition("=")
        value = value or next(iter(words[words.index(unknown[0]) + 1 :]), "...")
        key = nearest_key(option.lstrip("-").replace("-", "_"))
        parser.error(f"unrecognized argument {option}; keys are set without dashes, such as {key}={value}")
    # Server and learner share the cores. OpenMP's threads spin between parallel regions unless told not to, and hold
    # the core that the other process waits for; read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    stop, config = _Stop(), Config()
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
    except Exception as error:
        path = _write_traceback(error, config.run_dir, arguments.command)
        print(f"aurora-rl: {type(error).__name__}: {_one_line(error)}; the traceback is in {path}", file=sys.stderr)
        return 1


def _write_traceback(error: Exception, run_dir: str | None, command: str) -> Path:
    """Write a traceback into the run's folder, or into a temporary file where that cannot take it."""
    text = "".join(traceback.format_exception(error))
    path = Path(run_dir or tempfile.mkdtemp(prefix="aurora-rl-")) / f"{command}-traceback.txt"
    try:
        path.write_text(text, encoding="utf-8")
    except OSError:  # the run's folder is full, or gone
        path = Path(tempfile.mkdtemp(prefix="aurora-rl-")) / path.name
        path.write_text(text, encoding="utf-8")
    return path


def _one_line(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror and not error.filename else str(error)
    return " ".join(text.split())


def _new_run_dir(config: Config, document: str, *, suffix: str = "") -> Path:
    """Make the folder of a run, with its configuration in ``document``, and note it in the configuration.

    Raises:
        ConfigError: the folder cannot be made, or holds something already.
    """
    folder = Path(config.run_dir or "runs")
    try:
        if config.run_dir:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise ConfigError(
                    f"run_dir={config.run_dir!r} is not empty, and a run would overwrite what it holds; name a new "
                    "folder, or leave run_dir out for runs/<time>"
                )
        else:
            folder = _folder_of_now(folder, suffix)
        config.run_dir = str(folder)
        # "x": of two runs that find the folder empty at the same time, one is refused here.
        with open(folder / document, "x", encoding="utf-8") as file:
            file.write(to_yaml(config, run_dir=False))
    except OSError as error:
        raise ConfigError(f"run_dir={str(folder)!r} cannot be used: {error.strerror}") from error
    return folder


def _folder_of_now(parent: Path, suffix: str) -> Path:
    """Make a folder named by the time; runs of the same second get a number."""
    name = f"{time.strftime('%Y%m%d-%H%M%S')}{suffix}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    while True:
        folder = parent / next(names)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


@contextlib.contextmanager
def _gone_if_refused(run_dir: Path) -> Iterator[None]:
    """Remove a run's new folder if what the user asked for is refused, unless another process's log in it says why."""
    try:
        yield
    except (ValueError, OSError):
        if not any(run_dir.glob("*.log")):
            shutil.rmtree(run_dir, ignore_errors=True)
        raise


# ---- check ----------------------------------------------------------------------------------------------------------


def _check(config: Config) -> int:
    import torch

    from aurora_rl.cli.check import check_model

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

    from aurora_rl.cli.bench import bench_objectives

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
    from aurora_rl.cli import spec
    from aurora_rl.policies import get_drafter, load_drafter, save_drafter

    # Sizes and positions are checked against the target, and written as the target has them.
    target = spec.load(config)
    settings = config.drafter
    # Drafters that have names recognize their folders. Of others only the user may say what is imported.
    kind = get_drafter(settings.name) if ":" in settings.name else None
    drafter = load_drafter(
        arguments.drafter,
        target.parts,
        kind,
        layout=arguments.layout,
        options=settings.options,
        made_for=settings.made_for,
    )
    save_drafter(drafter.to(spec.dtype_of(config)), arguments.out.resolve(), arguments.to)
    print(f"{type(drafter).__name__} for {config.model} written to {arguments.out} ({arguments.to})")
    return 0


# ---- learn ----------------------------------------------------------------------------------------------------------


def _learn(config: Config, stop: _Stop, parent: int | None) -> int:
    os.nice(config.learner.nice)  # before the model is loaded: the server times its rounds meanwhile
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # A flywheel's learner shares its folder, where its configuration is already.
    alone = parent is None
    run_dir = _new_run_dir(config, "learner.yaml", suffix="-learner") if alone else Path(config.run_dir or "")
    log = MetricsLog(run_dir / "metrics.jsonl", "learner")
    _limit_caches()

    import torch

    from aurora_rl.cli import spec

    torch.set_num_threads(config.learner.threads)
    with _gone_if_refused(run_dir) if alone else contextlib.nullcontext():
        learner = spec.learner(config, log, run_dir)
    stop.working = True
    log.write("learner_ready", pid=os.getpid())
    print(f"learning; metrics and checkpoints in {run_dir}", flush=True)
    try:
        try:
            while not stop.requested:
                learner.step()
        except FloatingPointError:
            raise
        except (ValueError, OSError) as error:  # of the program, not of its input: show where
            raise RuntimeError(f"learning stopped: {type(error).__name__}: {_one_line(error)}") from error
        stop.ignore()
        learner.save()
    finally:
        learner.close()
    log.write("learner_done", seen=learner.seen, steps=learner.steps, version=learner.version)
    if learner.unrecorded:
        print(f"aurora-rl: {config.learner.record} lacks {learner.unrecorded} trajectories", file=sys.stderr)
        return 1
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
    began, console = time.monotonic(), plain_console()
    run_dir = _new_run_dir(config, "config.yaml")
    log = MetricsLog(run_dir / "metrics.jsonl", "server")
    reader = MetricsReader(run_dir / "metrics.jsonl")
    child: subprocess.Popen | None = None
    serving: Any = None
    requests: Any = None
    outputs = _Outputs()
    try:
        import torch

        from aurora_rl.cli import spec
        from aurora_rl.cli.engines import serving as build_serving
        from aurora_rl.memory import return_freed_memory

        torch.set_num_threads(config.engine.threads)
        with _gone_if_refused(run_dir):
            prompts = spec.check(config)
            console.print(f"loading {config.model} · run folder {run_dir}", soft_wrap=True)
            target = spec.load(config)
            requests = spec.request_queue(config, target, prompts)
            day0 = run_dir / "drafter-day0" if spawn_learner else None
            drafter, learner_config = spec.first_drafter(config, target, requests, day0)
            if spawn_learner:
                with stop.held():
                    child = _spawn(learner_config, run_dir)
            serving = build_serving(config, target, requests, drafter, log, run_dir)
            del target, drafter  # the engine and its policy have forms of their own
            return_freed_memory(collect=True)
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
        if serving is not None:
            outputs.write("the end of serving", serving.close)
        if child is not None and (lost := _end(child, run_dir)):
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
            self.failures.append(f"{name} could not be written: {_one_line(error) or repr(error)}")

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


def _spawn(config: Config, run_dir: Path) -> subprocess.Popen:
    """Start the learner in a session of its own, so that Ctrl-C reaches it through us, in order."""
    path = run_dir / "learner.yaml"
    path.write_text(to_yaml(config, run_dir=False), encoding="utf-8")
    # -P: a file in the working directory, such as profile.py, must not take the place of an installed module. A parent
    # that imports from there itself, as under python -m, shares its modules with the learner.
    safe = [] if os.getcwd() in sys.path else ["-P"]
    with open(run_dir / "learner.log", "wb") as output:
        return subprocess.Popen(
            [
                *(sys.executable, *safe, "-m", "aurora_rl.cli.main", "learn", "--config", str(path)),
                *("--parent", str(os.getpid()), f"run_dir={run_dir}"),
            ],
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


def _end(child: subprocess.Popen, run_dir: Path) -> str | None:
    """End the learner. Returns what went wrong with its end; one that had ended before was told already."""
    if child.poll() is not None:
        return None
    child.send_signal(signal.SIGTERM)
    try:
        child.wait(timeout=_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return f"the learner did not end within {_END_S:.0f} s and was killed; see {run_dir / 'learner.log'}"
    if child.returncode in (0, 130, -signal.SIGTERM):  # the latter two had not begun to learn
        return None
    return f"the learner ended with status {child.returncode}: {_last_line(run_dir)}; see {run_dir / 'learner.log'}"


def _decode(server: Any, view: LiveView, console: Console, stop: _Stop) -> None:
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
            raise RuntimeError(f"serving stopped: {type(error).__name__}: {_one_line(error)}") from error
        view.log_status()


if __name__ == "__main__":
    sys.exit(main())

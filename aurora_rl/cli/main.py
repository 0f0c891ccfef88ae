"""The command line: parse, resolve the configuration, and hand both to one of :data:`COMMANDS`."""

from __future__ import annotations

import argparse
import atexit
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from aurora_rl.cli.config import Config, load_config, nearest_key, to_yaml
from aurora_rl.cli.errors import TEMPORARY, ConfigError, may_pass
from aurora_rl.cli.output import SafeStream
from aurora_rl.cli.run_dir import make_absolute, resumed_config, write_traceback
from aurora_rl.cli.signals import Stop, end_with
from aurora_rl.memory import importing
from aurora_rl.telemetry.outputs import one_line


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    Attributes:
        help: What it does, in a line.
        module: File of this package with its functions ``register(parser)``, which adds the command's arguments, and
            ``run(config, arguments, stop)``, which returns the exit status. Imported for this command alone. A folder
            that it makes for its run is noted in ``arguments.run_dir``, where an unexpected error leaves its traceback.
        learns: Whether it trains, so that what PyTorch keeps of each shape of a batch is limited.
    """

    help: str
    module: str
    learns: bool = False


COMMANDS = {
    "serve": Command("serve OpenAI's API, learn from its traffic in a second process, and swap the drafter", "serve"),
    "flywheel": Command("the same server, driven by a file of prompts or by built-in traffic to its end", "serve"),
    "learn": Command("the training half: waits for a server's trajectories until interrupted", "learn", learns=True),
    "fleet": Command("run engines and their learner on a Ray cluster, and start again what dies", "fleet"),
    "train": Command("learn a drafter offline, from recordings or from a JSONL of chats", "train", learns=True),
    "check": Command("whether the model is served exactly, which drafters start, memory and round times", "check"),
    "bench": Command("how fast drafters learn, on a scenario or by several objectives", "bench", learns=True),
    "report": Command("write the report of a run, or of a bench, again from what is in its folder", "report"),
    "history": Command("the versions of a run, why each was published, promoted or rolled back", "history"),
    "drafter": Command("start a drafter, write it as an engine loads it, or print what a folder holds", "drafter"),
    "keys": Command("make the keys of a learner and its engines, for a wire between hosts", "keys"),
    "sglang": Command("learn from what a running SGLang serves its clients, tell its status, or detach", "attach"),
    "vllm": Command("learn from what a running vLLM serves its clients, tell its status, or detach", "attach"),
}
_MOVED = {"export": "drafter export"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``aurora-rl``.

    Returns:
        The exit status. 0: all was done. 1: something failed that is not the user's, or an output of the run could not
        be written. 2: an error of the user's. 75: what may pass by itself, such as a port in use. 130: interrupted
        before all was done.
    """
    # For parts by their import path, such as objectives=[{name: my_file:plain}]. The working directory comes last, so
    # that no file in it takes the place of an installed module.
    if "" not in sys.path:
        sys.path.append("")
    # A stream that was closed before we began, as by >&-, is None. These take its place and its descriptor: C libraries
    # write to that, and a file of the run must not get it.
    with (
        open(os.devnull, "w", encoding="utf-8") as no_output,
        open(os.devnull, "w", encoding="utf-8") as no_errors,
        contextlib.redirect_stdout(SafeStream(sys.stdout or no_output)),
        contextlib.redirect_stderr(SafeStream(sys.stderr or no_errors)),
    ):
        return _main(list(sys.argv[1:] if argv is None else argv))


def program() -> NoReturn:
    """Run ``aurora-rl`` as a process of its own, whose exit status is what :func:`main` returns.

    At its end Python would take apart the million objects of torch and transformers, which takes two seconds. The
    process ends before that, once its threads have ended and what the run registered with ``atexit`` was called.
    """
    status: Any = 1

    def end() -> None:
        logging.shutdown()  # was registered before this, and would come after it
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(status)

    atexit.register(end)  # the first to be registered is the last to be called
    try:
        status = main()
    except KeyboardInterrupt:
        status = 130
    except SystemExit as error:  # the parser's
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    sys.exit(status)


def _main(words: list[str]) -> int:
    # Server and learner share the cores. OpenMP's threads spin between parallel regions unless told not to, and hold
    # the core that the other process waits for; read when torch is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    name, stop = next((word for word in words if not word.startswith("-")), ""), Stop()
    config, arguments = Config(), argparse.Namespace()
    try:
        if name in _MOVED:
            raise ConfigError(f"`aurora-rl {name}` is called `aurora-rl {_MOVED[name]}` now")
        command = COMMANDS.get(name)
        if command is not None and command.learns:
            _limit_caches()
        with importing():
            module = None if command is None else importlib.import_module(f"aurora_rl.cli.{command.module}")
        arguments = _parse(words, name, module)
        if (starter := getattr(arguments, "end_with", None)) is not None:
            end_with(starter)
        usual = getattr(arguments, "usual", ())
        if (folder := getattr(arguments, "resume", None)) is None:
            config = load_config(arguments.config, arguments.overrides, usual)
        else:
            config = resumed_config(name, folder, arguments.config, arguments.overrides, usual)
        if arguments.print_config:
            print(to_yaml(config), end="")
            return 0
        config = make_absolute(config)
        assert module is not None, "the parser knows no other command"
        status: int = module.run(config, arguments, stop)
        return status
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"aurora-rl: {one_line(error)}", file=sys.stderr)
        return TEMPORARY if may_pass(error) else 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        path = write_traceback(error, getattr(arguments, "run_dir", config.run_dir), name)
        print(f"aurora-rl: {type(error).__name__}: {one_line(error)}; the traceback is in {path}", file=sys.stderr)
        return 1


def _parse(words: list[str], name: str, module: Any) -> argparse.Namespace:
    """Parse the words after ``aurora-rl``, of the command ``name``, whose module is None if there is no such one."""
    parser = argparse.ArgumentParser(prog="aurora-rl", description="Speculative decoding that learns while it serves.")
    parser.add_argument("--version", action="version", version=f"aurora-rl {version('aurora-rl')}")
    commands = parser.add_subparsers(dest="command", required=True)
    for each, command in COMMANDS.items():
        subparser = commands.add_parser(each, help=command.help, description=command.help)
        if each == name:
            module.register(subparser)
    arguments, unknown = parser.parse_known_args(words)
    if options := [word for word in unknown if word.startswith("-")]:  # --slots 2
        option, _, value = options[0].partition("=")
        value = value or next(iter(words[words.index(options[0]) + 1 :]), "...")
        key = nearest_key(option.lstrip("-").replace("-", "_"))
        example = f"{key}={value}" if key else "engine.slots=2"
        parser.error(f"unrecognized argument {option}; keys are set without dashes, such as {example}")
    if arguments.overrides is None and unknown:
        parser.error(f"unrecognized argument {unknown[0]}; aurora-rl {name} takes no key=value")
    for option, path in vars(arguments).items():  # all that begin with a tilde are paths
        if isinstance(path, list | str | Path):
            setattr(arguments, option, [*map(_at_home, path)] if isinstance(path, list) else _at_home(path))
    # argparse takes the first group of pairs only; options stand between groups.
    arguments.overrides = [*(arguments.overrides or ()), *unknown]
    return arguments


def _at_home(value: Any) -> Any:
    """Return the value of an option, with the home folder for a leading ``~``, which shells leave in ``--out=~/x``."""
    if isinstance(value, Path):
        return value.expanduser()
    return os.path.expanduser(value) if isinstance(value, str) else value


def _limit_caches() -> None:
    """Limit oneDNN's caches. Must run before torch is loaded in a process that learns.

    No two batches have the same number of rows. oneDNN keeps a kernel with its scratch memory for each of the last
    1,024 shapes, twice over, so that memory would grow with every request.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")


if __name__ == "__main__":
    program()

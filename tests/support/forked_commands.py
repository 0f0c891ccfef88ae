"""The command line in processes forked from one that has imported the library: they start in a tenth of a second.

A fresh interpreter takes eight seconds of CPU time for its imports. Whether these work is for the tests that start one,
and for the learners, which servers start themselves, as ever.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

# What commands import when they run.
MODULES = (
    *(
        f"aurora_rl.cli.{name}"
        for name in ("attach", "embedded", "http", "learn", "learner", "main", "remote", "serve")
    ),
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "transformers.models.llama.modeling_llama"),
)


class ForkedProcess:
    """A forked command, with what tests use of :class:`subprocess.Popen`.

    Attributes:
        pid: Id of the process. It leads a session and a process group of its own.
        returncode: Its exit status, or the signal that ended it below zero; None until that was asked for.
    """

    def __init__(self, messages: socket.socket) -> None:
        self._messages = messages  # its id, and at its end its status
        self.pid = int(messages.recv(64))
        self.returncode: int | None = None

    def poll(self) -> int | None:
        with contextlib.suppress(BlockingIOError):
            self._receive(0.0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        try:
            self._receive(timeout)
        except TimeoutError:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0) from None
        assert self.returncode is not None
        return self.returncode

    def _receive(self, timeout: float | None) -> None:
        if self.returncode is None:
            self._messages.settimeout(timeout)
            self.returncode = int(self._messages.recv(64))
            self._messages.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Forks:
    """The process that commands are forked from, as a context manager. It starts with the first command."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._requests.close()
            self._process.wait()

    def start(
        self,
        words: Sequence[str],
        stdout: IO[bytes] | int,
        stderr: IO[bytes] | int,
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ForkedProcess:
        """Run ``aurora-rl`` with these words, or the Python file that the first one names.

        Signals have their usual effect, whatever this process ignores.
        """
        if self._process is None:
            self._requests, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with writer:
                command = [sys.executable, "-m", "forked_commands", str(writer.fileno())]
                path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
                self._process = subprocess.Popen(
                    command,
                    pass_fds=[writer.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,  # Ctrl-C ends the tests, and they end it
                    env=os.environ | {"PYTHONPATH": path},
                )
        request = {"words": list(words), "cwd": str(cwd or Path.cwd()), "env": dict(os.environ if env is None else env)}
        reader, writer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with writer:
            files = [each if isinstance(each, int) else each.fileno() for each in (stdout, stderr)]
            socket.send_fds(self._requests, [json.dumps(request).encode()], [*files, writer.fileno()])
        return ForkedProcess(reader)


def _serve(requests: socket.socket) -> list[str]:
    """Fork for each request, until the tests end. Returns, in the fork that is a command, its words."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that waited for a command
                pass
        if not message:
            os._exit(0)
        if os.fork() == 0:
            break
        for each in descriptors:
            os.close(each)
    # A second fork: this process waits for the command, and the one that commands are forked from need not.
    *outputs, messages = descriptors
    if pid := os.fork():
        os.write(messages, str(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])).encode())
        os._exit(0)
    requests.close()
    os.setsid()
    for own, each in zip((1, 2), outputs, strict=True):
        os.dup2(each, own)
        os.close(each)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = json.loads(message)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]  # as of `python -m`
    os.write(messages, str(os.getpid()).encode())
    os.close(messages)
    return request["words"]


if __name__ == "__main__":
    from aurora_rl.memory import importing

    with importing():
        import torch

        for name in MODULES:
            importlib.import_module(name)
    torch.set_num_threads(1)
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads: a fork has one of them, and what the others held stays locked"
    words = _serve(socket.socket(fileno=int(sys.argv[1])))
    if words[0].endswith(".py"):
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
    else:
        sys.argv[1:] = words
        importlib.import_module("aurora_rl.cli.main").program()

"""Sockets: clear binding errors, and threads that end in time."""

from __future__ import annotations

import socket as plain
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq

from aurora_rl.collectors.codec import DEFAULT_LIMITS
from aurora_rl.collectors.sockets import SocketThread, bind, connect, open_socket


@pytest.mark.parametrize("port", ["*", "0"])
def test_bind_reports_the_real_port(port: str) -> None:
    socket, context = open_socket(zmq.PULL, None)
    address = bind(socket, f"tcp://127.0.0.1:{port}")
    assert int(address.rsplit(":", 1)[1]) > 0
    socket.close()
    context.term()


def test_bind_to_a_taken_address_names_it_and_the_cure(tmp_path: Path) -> None:
    context = zmq.Context()
    for wanted in ("tcp://127.0.0.1:*", f"ipc://{tmp_path}/s", "inproc://s"):
        first, _ = open_socket(zmq.PULL, context)
        address = bind(first, wanted)
        second, _ = open_socket(zmq.PULL, context)
        with pytest.raises(OSError, match=f"{address} is in use; stop the process"):
            bind(second, address)
        assert second.closed
        first.close()
    context.term()


def test_an_ipc_file_left_by_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    with plain.socket(plain.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    assert (tmp_path / "s").is_socket()
    socket, context = open_socket(zmq.PULL, None)
    assert bind(socket, f"ipc://{tmp_path}/s").endswith("/s")
    socket.close()
    context.term()


def test_a_file_that_is_no_socket_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    for name in ("notes", "folder", "link"):
        socket, context = open_socket(zmq.PULL, None)
        with pytest.raises(OSError, match=f"{name} exists and is no socket; choose another path, or remove it"):
            bind(socket, f"ipc://{tmp_path}/{name}", context)
        assert socket.closed and context is not None and context.closed
    assert (tmp_path / "notes").read_text() == "kept" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("function", "port"), [(bind, 65536), (bind, 99999), (bind, -1), (connect, 99999), (connect, 0)]
)
def test_ports_that_do_not_exist(function: Callable[..., object], port: int) -> None:
    for options in ({}, {"limits": DEFAULT_LIMITS}):
        socket, context = open_socket(zmq.PULL, None)
        with pytest.raises(OSError, match=rf"'tcp://127.0.0.1:{port}'.* port {port} does not lie in [01]\.\.65535"):
            function(socket, f"tcp://127.0.0.1:{port}", context, **options)
        assert socket.closed


def test_malformed_addresses() -> None:
    for function in (bind, connect):
        socket, context = open_socket(zmq.PULL, None)
        with pytest.raises(OSError, match="expected tcp://host:port"):
            function(socket, "nonsense")
        assert socket.closed
        context.term()


def test_close_is_bounded_by_a_stuck_step_and_idempotent() -> None:
    socket, context = open_socket(zmq.PUSH, None)
    release = threading.Event()
    thread = SocketThread(socket, lambda: not release.wait(20), name="stuck", owned_context=context)
    thread.start()
    start = time.monotonic()
    thread.close(0.0)
    thread.close(0.0)
    assert time.monotonic() - start < 3
    assert thread.closing and thread.expired
    release.set()


def test_thread_ends_when_its_context_is_terminated() -> None:
    context = zmq.Context()
    socket, owned = open_socket(zmq.PULL, context)
    assert owned is None
    thread = SocketThread(socket, lambda: socket.poll(1000) == 0, name="orphan", owned_context=None)
    thread.start()
    context.term()  # returns only once the socket is closed
    assert socket.closed
    thread.close(0.1)

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
    socket = open_socket(zmq.PULL)
    address = bind(socket, f"tcp://127.0.0.1:{port}")
    assert int(address.rsplit(":", 1)[1]) > 0
    socket.close()


def test_bind_to_a_taken_address_names_it_and_the_cure(tmp_path: Path) -> None:
    for wanted in ("tcp://127.0.0.1:*", f"ipc://{tmp_path}/s"):
        first, second = open_socket(zmq.PULL), open_socket(zmq.PULL)
        address = bind(first, wanted)
        with pytest.raises(OSError, match=f"{address} is in use; stop the process"):
            bind(second, address)
        assert second.closed
        first.close()


def test_an_ipc_file_left_by_a_dead_process_is_no_obstacle(tmp_path: Path) -> None:
    with plain.socket(plain.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "s"))
    assert (tmp_path / "s").is_socket()
    socket = open_socket(zmq.PULL)
    assert bind(socket, f"ipc://{tmp_path}/s").endswith("/s")
    socket.close()


def test_a_closed_socket_leaves_no_ipc_file_but_that_of_another_process(tmp_path: Path) -> None:
    socket, path = open_socket(zmq.PULL), tmp_path / "s"
    bind(socket, f"ipc://{path}")
    assert path.is_socket()
    socket.close()
    assert not path.exists()
    socket = open_socket(zmq.PULL)
    bind(socket, f"ipc://{path}")
    path.unlink()
    with plain.socket(plain.AF_UNIX) as successor:
        successor.bind(str(path))
        socket.close()
        assert path.is_socket()


def test_a_file_that_is_no_socket_is_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("kept")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "notes")
    for name in ("notes", "folder", "link"):
        socket = open_socket(zmq.PULL)
        with pytest.raises(OSError, match=f"{name} exists and is no socket; choose another path, or remove it"):
            bind(socket, f"ipc://{tmp_path}/{name}")
        assert socket.closed and socket.context.closed
    assert (tmp_path / "notes").read_text() == "kept" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize(
    ("function", "port"), [(bind, 65536), (bind, 99999), (bind, -1), (connect, 99999), (connect, 0)]
)
def test_ports_that_do_not_exist(function: Callable[..., object], port: int) -> None:
    for options in ({}, {"limits": DEFAULT_LIMITS}):
        socket = open_socket(zmq.PULL)
        with pytest.raises(OSError, match=rf"'tcp://127.0.0.1:{port}'.* port {port} does not lie in [01]\.\.65535"):
            function(socket, f"tcp://127.0.0.1:{port}", **options)
        assert socket.closed


def test_malformed_addresses() -> None:
    for function in (bind, connect):
        for address in ("nonsense", "tcp://127.0.0.1", "inproc://s"):
            socket = open_socket(zmq.PULL)
            with pytest.raises(OSError, match="expected tcp://host:port"):
                function(socket, address)
            assert socket.closed


def test_close_is_bounded_by_a_stuck_step_and_idempotent() -> None:
    socket = open_socket(zmq.PUSH)
    release = threading.Event()
    thread = SocketThread(socket, lambda: not release.wait(20), name="stuck")
    thread.start()
    start = time.monotonic()
    thread.close(0.0)
    thread.close(0.0)
    assert time.monotonic() - start < 3
    assert thread.closing and thread.expired
    release.set()


def test_a_thread_ends_when_its_socket_fails(caplog: pytest.LogCaptureFixture) -> None:
    socket = open_socket(zmq.PULL)

    def fail() -> bool:
        raise zmq.ContextTerminated

    thread = SocketThread(socket, fail, name="orphan")
    thread.start()
    thread.close(0.1)
    assert socket.closed and "orphan stops" in caplog.text

"""`aurora-rl learn`: what keeps it from starting."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from aurora_rl.cli import main as cli


def test_learn_with_a_port_in_use(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = next(a.partition("=")[2] for a in arguments if a.startswith("wire.weights"))
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        assert cli.main(["learn", *arguments]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aurora-rl: {address} is in use;")
    assert "set wire.weights to another address" in line
    assert not (tmp_path / "run").exists()

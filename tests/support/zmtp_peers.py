"""Peers that write ZMTP by hand."""

from __future__ import annotations

import socket
import struct

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
PING = b"\x04\x07\x04PING\x00\x00"


def part(body: bytes, *, more: bool = True) -> bytes:
    return bytes([2 | more]) + struct.pack(">Q", len(body)) + body


def shake_hands(raw: socket.socket, kind: bytes) -> None:
    ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    raw.sendall(GREETING + b"\x04" + bytes([len(ready)]) + ready)
    answer = b""  # ZeroMQ takes no messages before it has sent its own READY
    while b"READY" not in answer:
        received = raw.recv(4096)
        assert received, "no handshake"
        answer += received


def peer(address: str, kind: bytes) -> socket.socket:
    host, port = address.removeprefix("tcp://").rsplit(":", 1)
    raw = socket.create_connection((host, int(port)), timeout=10)
    shake_hands(raw, kind)
    return raw

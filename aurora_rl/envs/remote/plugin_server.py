"""Requests and replies between the plugin inside an engine and those who attach to it.

The plugin binds one ROUTER socket, on this host only unless it has keys. Every message is JSON without tensors in the
project's codec: ``status``, ``attach``, ``detach``, ``record`` and ``delete`` are answered by ``status``, what cannot
be done by ``refused`` with a reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import zmq

from aurora_rl.collectors.codec import CodecError, Limits, decode, encode
from aurora_rl.collectors.keys import ClientKeys, ServerKeys
from aurora_rl.collectors.sockets import SocketThread, bind, connect, open_socket
from aurora_rl.remote_engines import address_variable, keys_variable

logger = logging.getLogger(__name__)

_LIMITS = Limits(max_bytes=1 << 16, max_leaves=0, max_header_bytes=1 << 16)
_TURN_MS = 50


class PluginError(RuntimeError):
    """An engine cannot do what it was asked; the message says why."""


class PluginServer:
    """The plugin's end, in a thread of its own; OSError if its address cannot be bound.

    ``answer`` turns the kind and fields of a request into the fields of ``status``; PluginError refuses.
    """

    def __init__(
        self, address: str, answer: Callable[[str, dict[str, Any]], dict[str, Any]], *, keys: ServerKeys | None = None
    ) -> None:
        self._answer = answer
        self._socket = open_socket(zmq.ROUTER)
        self._socket.maxmsgsize = _LIMITS.max_bytes
        self.address = bind(self._socket, address, limits=_LIMITS, keys=keys)
        self._thread = SocketThread(self._socket, self._step, name="engine-plugin")
        self._thread.start()

    def close(self) -> None:
        """End."""
        self._thread.close(1.0)

    def _step(self) -> bool:
        if self._socket.poll(_TURN_MS):
            identity, *frames = self._socket.recv_multipart()
            try:
                message = decode(frames, limits=_LIMITS)
                reply = encode("status", self._answer(message.kind, message.meta))
            except (CodecError, PluginError) as error:
                reply = encode("refused", {"reason": str(error)})
            except Exception as error:  # a fault of ours must not end the thread, or nobody reaches the engine again
                logger.exception("a request to the plugin failed")
                reply = encode("refused", {"reason": f"{type(error).__name__}: {error}"})
            self._socket.send_multipart([identity, *reply])
        return not self._thread.closing


def ask(
    address: str,
    kind: str,
    fields: dict[str, Any] | None = None,
    *,
    engine: str,
    keys: ClientKeys | None = None,
    timeout: float = 10.0,
) -> dict[str, Any]:
    """Send a request to a plugin and wait for its status.

    Args:
        address: Address of the plugin.
        kind: "status", "attach", "detach", "record" or "delete".
        fields: Fields of the request, plain JSON; None has none.
        engine: Name of the engine, for messages.
        keys: Keys of this client; None if the plugin has none.
        timeout: Seconds to wait.

    Returns:
        The plugin's status.

    Raises:
        PluginError: The plugin at ``address`` refuses, or does not answer within ``timeout`` seconds.
    """
    socket = open_socket(zmq.DEALER)
    try:
        connect(socket, address, keys=keys)
        socket.send_multipart(encode(kind, fields or {}))
        if not socket.poll(int(timeout * 1e3)):
            raise PluginError(
                f"no answer at {address} within {timeout:.0f} s; does {engine} run with "
                f"{address_variable(engine)}={address} in its environment and aurora-rl installed next to it? Both "
                f"sides have keys or none: wire.keys here, {keys_variable(engine)} there"
            )
        message = decode(socket.recv_multipart(), limits=_LIMITS)
    finally:
        socket.close(linger=0)
    if message.kind == "refused":
        raise PluginError(str(message.meta.get("reason")))
    return message.meta


def replica_address(address: str, number: int) -> str:
    """Return where the plugin of a data-parallel replica answers, if that of the first answers at ``address``.

    >>> replica_address("tcp://127.0.0.1:5560", 2), replica_address("ipc:///tmp/plugin", 1)
    ('tcp://127.0.0.1:5562', 'ipc:///tmp/plugin-1')

    Raises:
        PluginError: The address is of TCP and has no port to count from.
    """
    if not number:
        return address
    if address.startswith("ipc://"):
        return f"{address}-{number}"
    host, _, port = address.rpartition(":")
    if not port.isdecimal():
        raise PluginError(f"{address}: data-parallel replicas answer at the ports after it; give one with a port")
    return f"{host}:{int(port) + number}"

"""Base of all engines' plugins: answers attach, detach, record and delete, and contains our faults."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import WireKeyError, plugin_server_keys
from aurora_rl.envs.remote.plugin_server import PluginError, PluginServer
from aurora_rl.envs.remote.session import Session
from aurora_rl.tenants import check_tenant

logger = logging.getLogger(__name__)


class RecorderPlugin(ABC):
    """State of one engine process, which answers requests at ``address``, with the keys in a folder if there are.

    A plugin of an engine adds the hooks, and says what is served (:meth:`_status`) and what is refused
    (:meth:`_check_engine`). A hook calls the engine's own function with the same arguments and returns its result.
    """

    engine: ClassVar[str]
    """Name of the engine, for messages."""

    def __init__(self, address: str, keys: str | None = None) -> None:
        self._address, self._keys = address, keys
        self._server: PluginServer | None = None
        self._session: Session | None = None
        self._last_session = ""
        self._seen: Counter[str] = Counter()

    # ---- what an engine's plugin says -------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _exact(self) -> bool:
        """Whether every round shows what the target's head reads."""

    @abstractmethod
    def _status(self) -> dict[str, Any]:
        """Return what is served, which hooks have seen something, and the session's own status."""

    @abstractmethod
    def _check_engine(self, handshake: Handshake) -> None:
        """Raise PluginError where this engine is not what the handshake says or what the hooks were written for."""

    # ---- requests and replies ---------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Begin to answer. If the address cannot be bound, log why and serve on."""
        try:
            keys = None if self._keys is None else plugin_server_keys(self._keys)
            self._server = PluginServer(self._address, self._answer, keys=keys)
        except (OSError, WireKeyError) as error:  # also in further processes of a server on several GPUs, refused later
            logger.error("nobody can attach here: %s", error)

    def _answer(self, kind: str, fields: dict[str, Any]) -> dict[str, Any]:
        if kind == "attach":
            self._attach(fields)
        elif kind == "detach":
            session, self._session = self._session, None
            if session is not None:
                session.close()
                return self._status() | session.status()
        elif kind in ("record", "delete"):
            if self._session is None:
                raise PluginError("nothing is attached; attach first")
            if kind == "record":
                self._session.recording, self._session.error = bool(fields.get("on")), ""
                return self._status()
            return self._status() | {"deleted": self._session.delete(check_tenant(fields.get("tenant")))}
        elif kind != "status":
            raise PluginError(f"there is no request {kind!r}; there are status, attach, detach, record and delete")
        return self._status()

    def _attach(self, fields: dict[str, Any]) -> None:
        if self._session is not None:
            raise PluginError("a learner is attached already; detach first")
        session = Session(fields, engine=self.engine, exact=self._exact, keys=self._keys)
        try:
            self._check_engine(session.handshake)
        except PluginError:
            session.close()
            raise
        self._session, self._last_session = session, session.id

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def _guarded(self, action: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Run an action of ours on the serving path. A fault switches recording off."""
        session = self._session
        try:
            action(*args, **kwargs)
        except Exception as error:
            logger.exception("a fault of the recorder")
            if session is not None:
                session.fail(f"{type(error).__name__}: {error}")

    def _after(self, keep: Callable[..., None]) -> Callable[..., Any]:
        """Return a hook that hands the session, the result and the arguments to ``keep``, if a learner is attached."""

        def hook(original: Callable, *args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if (session := self._session) is not None:
                self._guarded(keep, session, out, *args, **kwargs)
            return out

        return hook

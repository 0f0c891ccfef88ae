"""Bearer keys: who may use the server."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterable
from pathlib import Path

from starlette.types import ASGIApp, Receive, Scope, Send

from aurora_rl.serving.http.errors import ApiError

ENVIRONMENT = "AURORA_RL_API_KEYS"
"""Environment variable with keys, separated by blanks, commas or line ends."""


def read_api_keys(path: str | os.PathLike[str] | None) -> list[str]:
    """Return the keys of a file, one a line, or of the environment; none leaves the server open.

    Args:
        path: File; blank lines and lines that begin with ``#`` are skipped. None reads the environment variable
            ``AURORA_RL_API_KEYS``.

    Raises:
        ValueError: The file cannot be read or holds no key, or the variable is set and empty.
    """
    if path is None:
        if (text := os.environ.get(ENVIRONMENT)) is None:
            return []
        keys, source = text.replace(",", " ").split(), f"the environment variable {ENVIRONMENT}"
    else:
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot read the API keys: {error}") from error
        keys, source = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")], str(path)
    if not keys:
        raise ValueError(f"{source} holds no API key, and would let everyone in; add a key, or leave it out")
    return keys


class BearerKeys:
    """ASGI middleware that lets requests with a known bearer key pass, and all to the open paths.

    ``failed`` is called with the code of the error for each request for a completion that is refused.
    """

    def __init__(
        self, app: ASGIApp, keys: Iterable[str], open_paths: Iterable[str], failed: Callable[[str], None]
    ) -> None:
        self._app, self._open, self._failed = app, frozenset(open_paths), failed
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with status 401."""
        if scope["type"] != "http" or scope["path"] in self._open or self._known(scope):
            await self._app(scope, receive, send)
            return
        message = "a valid API key is needed: send the header 'Authorization: Bearer KEY'"
        error = ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        if scope["path"].endswith("/completions"):
            self._failed(str(error.code))
        await error.response()(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = (sent[0] if len(sent) == 1 else b"").partition(b" ")
        digest, found = _digest(key.strip()), False
        for each in self._digests:  # all of them, so that the time tells nothing
            found |= hmac.compare_digest(each, digest)
        return found and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

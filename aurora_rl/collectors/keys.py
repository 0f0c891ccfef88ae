"""CurveZMQ keys of a learner and its engines: the files that hold them, and who may connect to whom.

A folder, as ``aurora-rl keys`` writes it::

    learner.key              learner.key_secret
    engines/NAME.key         engines/NAME.key_secret

The learner listens for trajectories and weights with its own secret key, and admits the public keys in ``engines/``. An
engine connects with its secret key, and only to the learner that has ``learner.key``. The plugin of
SGLang or vLLM has a socket that belongs to its engine: whoever holds that engine's secret key may attach.
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth import load_certificate

_LEARNER, _ENGINES = "learner", "engines"
_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"


class WireKeyError(ValueError):
    """A key that is missing or cannot be used; the message names the file and the fix."""


@dataclass(frozen=True, slots=True)
class ClientKeys:
    """Keys of a connecting socket: the name of its own, its pair, and the public key that the other side must have."""

    name: str
    public: bytes
    secret: bytes
    server: bytes


@dataclass(frozen=True, slots=True)
class ServerKeys:
    """Keys of a listening socket: its secret key, and the file or the folder of the public keys that it admits.

    They are read at every handshake, so that a key that is added or removed counts at once.
    """

    secret: bytes
    admitted: Path

    def name_of(self, public: bytes) -> str | None:
        """Return the name of an admitted key; None if it is not admitted.

        Raises:
            WireKeyError: It is in none of the files, one of which is broken.
        """
        broken = None
        for file in sorted(self.admitted.glob("*.key")) if self.admitted.is_dir() else [self.admitted]:
            try:
                if _read(file)[0] == public:
                    return file.stem
            except WireKeyError as fault:  # the other files still count
                broken = fault
        if broken is not None:
            raise broken
        return None


def learner_keys(folder: str | os.PathLike[str]) -> ServerKeys:
    """Read the keys of a learner, which admits the engines of the folder.

    Raises:
        WireKeyError: A file is missing, broken, or may be read by others.
    """
    engines = Path(folder) / _ENGINES
    if not any(engines.glob("*.key")):
        raise WireKeyError(
            f"{engines} holds no public key (NAME.key), so that no engine would be admitted; {_cure(folder)}"
        )
    for file in engines.glob("*.key"):
        _read(file)
    return ServerKeys(_secret(Path(folder) / f"{_LEARNER}.key_secret", folder)[1], engines)


def engine_keys(folder: str | os.PathLike[str]) -> ClientKeys:
    """Read the keys of the engine whose secret key the folder holds, to connect to the learner.

    Raises:
        WireKeyError: A file is missing, broken, or may be read by others; or there are several secret keys.
    """
    file, (public, secret) = _engine(folder)
    return ClientKeys(file.stem, public, secret, _read(Path(folder) / f"{_LEARNER}.key")[0])


def plugin_server_keys(folder: str | os.PathLike[str]) -> ServerKeys:
    """Read the keys with which the plugin of SGLang or vLLM listens: its own pair; errors as of `engine_keys`."""
    file, (_, secret) = _engine(folder)
    return ServerKeys(secret, file.with_suffix(".key"))


def plugin_client_keys(folder: str | os.PathLike[str]) -> ClientKeys:
    """Read the keys with which that plugin is asked: the engine's own pair, too; errors as of `engine_keys`."""
    file, (public, secret) = _engine(folder)
    return ClientKeys(file.stem, public, secret, public)


def make_keys(folder: str | os.PathLike[str], engine: str = "engine") -> list[Path]:
    """Write the keys of a learner and of an engine, by its name, where they are missing; secret ones with mode 0600.

    Returns:
        The files that were written.

    Raises:
        WireKeyError: The name cannot be that of a file, the folder is one, or libzmq was built without CURVE.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     [path.name for path in make_keys(folder)], make_keys(folder)
        (['learner.key', 'learner.key_secret', 'engine.key', 'engine.key_secret'], [])
    """
    if not re.fullmatch(_NAME, engine):
        raise WireKeyError(f"the name of an engine has letters, digits, - and _, got {engine!r}")
    if not zmq.has("curve"):
        raise WireKeyError("libzmq was built without CURVE; install pyzmq from PyPI, whose wheels have it")
    if Path(folder).is_file():
        raise WireKeyError(f"{folder} is a file; name a folder")
    written = []
    for path in (Path(folder) / f"{_LEARNER}.key", Path(folder) / _ENGINES / f"{engine}.key"):
        hidden = path.with_suffix(".key_secret")
        if path.exists() or hidden.exists():
            continue
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        public, secret = (key.decode() for key in zmq.curve_keypair())
        _write(path, f'curve\n    public-key = "{public}"\n', 0o644)
        _write(hidden, f'curve\n    public-key = "{public}"\n    secret-key = "{secret}"\n', 0o600)
        written += [path, hidden]
    return written


def _engine(folder: str | os.PathLike[str]) -> tuple[Path, tuple[bytes, bytes]]:
    """Return the file of the only secret key of an engine, and the two keys in it."""
    engines = Path(folder) / _ENGINES
    files = sorted(engines.glob("*.key_secret"))
    if len(files) != 1:
        found = f"the secret keys {', '.join(file.name for file in files)}" if files else "no secret key"
        raise WireKeyError(f"{engines} holds {found}, and an engine needs one, its own; {_cure(folder)}")
    return files[0], _secret(files[0], folder)


def _secret(file: Path, folder: str | os.PathLike[str]) -> tuple[bytes, bytes]:
    if not file.exists():
        raise WireKeyError(f"{file} is missing; {_cure(folder)}")
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise WireKeyError(f"{file} may be read by others; chmod 600 {file}")
    public, secret = _read(file)
    if secret is None:
        raise WireKeyError(f"{file} has no secret key; {_cure(folder)}")
    return public, secret


def _read(file: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = load_certificate(file)
    except (OSError, ValueError) as error:
        raise WireKeyError(
            f"{file} holds no key: {error}; copy it again from where `aurora-rl keys` was run"
        ) from error
    for key in (public, secret):
        if key is not None and not re.fullmatch(rb"[!-~]{40}", key):
            raise WireKeyError(f"{file} holds a broken key; copy it again from where `aurora-rl keys` was run")
    return public, secret


def _write(path: Path, text: str, mode: int) -> None:
    # The mode from the start: a file that is closed to others afterwards was open to them for a moment.
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="ascii") as file:
        file.write(text)


def _cure(folder: str | os.PathLike[str]) -> str:
    return f"`aurora-rl keys {os.fspath(folder)}` makes keys, docs/security.md says which host needs which"

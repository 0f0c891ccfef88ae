"""The training states of a run: numbered folders, written whole, whose files are known by their checksums."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = "1.0"
"""Major and minor version of the layout. A release reads every minor version of its major one, and older major ones."""

_MANIFEST = "manifest.json"
_PART = ".part"  # a state that is being written


class StateError(ValueError):
    """A training state that cannot be used; the message names the folder and the file."""


def states(folder: str | os.PathLike[str]) -> list[Path]:
    """Return what may be a training state in a folder, the newest first.

    Numbered folders are states of a learner. A folder with ``progress.json`` is a state itself, such as one of
    ``aurora-rl train``.
    """
    folder = Path(folder)
    numbered = [each for each in folder.glob("[0-9]*") if each.name.isdigit() and each.is_dir()]
    whole = [folder] if (folder / "progress.json").is_file() else []
    return sorted(numbered, key=lambda each: int(each.name), reverse=True) + whole


def add_state(folder: str | os.PathLike[str], write: Callable[[Path], None], keep: int) -> Path:
    """Add the newest state to a folder, and remove all but the newest ``keep``.

    A call that is killed at any point has added the whole state or nothing. One process writes.

    Args:
        folder: Folder of the states.
        write: Makes the folder that it is called with, and writes the files of the state to it.
        keep: Number of states to keep, at least 1.

    Returns:
        Folder of the new state.

    Raises:
        OSError: It cannot be written, as on a full disk; the states are as they were.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> def write(state: Path) -> None:
        ...     state.mkdir(parents=True)
        ...     (state / "progress.json").write_text("{}")
        >>> with TemporaryDirectory() as folder:
        ...     for _ in range(3):
        ...         newest = add_state(folder, write, keep=2)
        ...     check_state(newest)
        ...     newest.name, [state.name for state in states(folder)]
        ('000003', ['000003', '000002'])
    """
    folder = Path(folder)
    part, newest = folder / _PART, max((int(each.name) for each in states(folder) if each != folder), default=0)
    shutil.rmtree(part, ignore_errors=True)  # left by a call that was killed
    try:
        write(part)
        _seal(part)
        os.replace(part, folder / f"{newest + 1:06d}")
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):  # there are others in it
            folder.rmdir()
        raise
    for old in states(folder)[keep:]:
        if old != folder:
            shutil.rmtree(old, ignore_errors=True)
    return folder / f"{newest + 1:06d}"


def check_state(state: Path) -> None:
    """Compare every file of a state with what was written.

    A state that is no numbered folder may lack checksums: ``aurora-rl train`` and earlier releases wrote none.

    Raises:
        StateError: A file is missing or differs, or the layout is of a newer major version.
    """
    if not state.name.isdigit() and not (state / _MANIFEST).exists():
        return
    try:
        manifest: dict[str, Any] = json.loads((state / _MANIFEST).read_bytes())
        written, files = manifest.pop("checksum"), dict(manifest["files"])
        major = int(manifest["format"].partition(".")[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StateError(f"{state}: {_MANIFEST} cannot be read ({error!r})") from error
    if major > int(FORMAT.partition(".")[0]):
        raise StateError(
            f"{state} has the format {manifest['format']}, this release reads {FORMAT} and older ones; use the release "
            "that wrote it"
        )
    if _text_digest(manifest) != written:
        raise StateError(f"{state}: {_MANIFEST} is not what was written")
    for name, digest in files.items():
        try:
            found = _file_digest(state / name)
        except OSError as error:
            raise StateError(f"{state}: {name} cannot be read ({error.strerror})") from error
        if found != digest:
            raise StateError(f"{state}: {name} is not what was written")


def newest_valid(folder: str | os.PathLike[str]) -> tuple[Path | None, list[str]]:
    """Return the newest state whose files are what was written, and why each newer one is not used.

    The first is None if there is none.
    """
    refused: list[str] = []
    for state in states(folder):
        try:
            check_state(state)
        except StateError as error:
            refused.append(str(error))
        else:
            return state, refused
    return None, refused


def _seal(state: Path) -> None:
    """Write the checksums of a state's files, which are on the disk then."""
    files = sorted(path for path in state.rglob("*") if path.is_file())
    manifest = {"format": FORMAT, "files": {str(path.relative_to(state)): _file_digest(path) for path in files}}
    (state / _MANIFEST).write_text(json.dumps({**manifest, "checksum": _text_digest(manifest)}, indent=2) + "\n")
    for path in (*files, state / _MANIFEST):
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _text_digest(manifest: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(manifest, sort_keys=True).encode(), digest_size=16).hexdigest()

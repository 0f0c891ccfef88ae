"""Tensors and JSON documents on disk: safetensors files, and files and folders that are written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the fix."""


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the umask's permissions; safetensors itself lets only the owner read it.

    Raises:
        OSError: It cannot be written.
    """
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # its own for a full disk
        raise OSError(str(error)) from error
    path.chmod(mode)


def write_file(path: Path, content: str | Callable[[Path], object]) -> None:
    """Replace a file whole or not at all. A call that is killed leaves the old file. One process writes.

    Args:
        path: File to replace, or to make.
        content: Text of the file, or a function that writes the file at the path that it is given.

    Raises:
        OSError: It cannot be written, as on a full disk, or the function's own error; the file is as it was.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        if isinstance(content, str):
            part.write_text(content, encoding="utf-8")
        else:
            content(part)
        os.replace(part, path)
    except Exception:  # writers have errors of their own for a full disk, such as torch.save's RuntimeError
        part.unlink(missing_ok=True)
        raise


def write_folder(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    documents: Mapping[str, Any],
    more: Mapping[str, Mapping[str, Tensor]] = MappingProxyType({}),
) -> None:
    """Replace ``folder`` by one with ``model.safetensors`` and a JSON file for each document.

    A call that is killed at any point leaves the old folder or the new one to :func:`read_folder`. One process writes.

    Args:
        folder: Folder to replace, or to make.
        tensors: What ``model.safetensors`` holds.
        documents: JSON values by the paths of their files in the folder.
        more: Tensors of further safetensors files, by their paths in the folder.

    Raises:
        OSError: It cannot be written, as on a full disk, or is the working directory, of which the process would be
            left with the old one. The message names the folder, which is as it was.
    """
    if is_working_directory(folder):
        raise OSError(f"{folder} cannot be written: it is the working directory; name a folder in it")
    folder = Path(folder)
    new, old = _next_to(folder, "new"), _next_to(folder, "old")
    shutil.rmtree(new, ignore_errors=True)  # left by a call that was killed
    try:
        new.mkdir(parents=True)
        for name, held in {"model.safetensors": tensors, **more}.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            save_tensors({key: t.detach().cpu().contiguous() for key, t in held.items()}, new / name)
        for name, document in documents.items():
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            (new / name).write_text(json.dumps(document, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
    except OSError as error:
        shutil.rmtree(new, ignore_errors=True)
        if old.exists() and not folder.exists():
            with contextlib.suppress(OSError):  # read_folder finds it there too
                os.replace(old, folder)
        raise OSError(f"{folder} cannot be written: {error}") from error
    shutil.rmtree(old, ignore_errors=True)


def complete_folder(folder: str | os.PathLike[str]) -> Path:
    """Return the folder that :func:`write_folder` left: another one where it was killed between its two renames."""
    folder = Path(folder)
    old = _next_to(folder, "old")
    return old if old.exists() and not folder.exists() else folder


def read_folder(folder: str | os.PathLike[str], document: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and one document of a folder from :func:`write_folder`, or from one with PyTorch's ``.bin``.

    Raises:
        CheckpointError: A file is missing or broken.
    """
    folder = complete_folder(folder)
    try:
        older = folder / "pytorch_model.bin"
        if older.exists() and not (folder / "model.safetensors").exists():
            # Tensors only: nothing else in the file is brought to life.
            tensors = torch.load(older, map_location="cpu", weights_only=True)
        else:
            tensors = load_file(folder / "model.safetensors")
        return tensors, json.loads((folder / document).read_text())
    except (OSError, SafetensorError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{folder} is not a checkpoint: {error}; give a folder with model.safetensors and {document}"
        ) from error


def is_working_directory(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder is the working directory, under whatever path.

    Example:
        >>> is_working_directory("."), is_working_directory("not-there")
        (True, False)
    """
    try:
        return os.path.samefile(folder, os.curdir)
    except OSError:  # one of them is not there: a working directory may be deleted while a process runs in it
        return False


def _next_to(folder: Path, state: str) -> Path:
    """Return where the new or the old files of a folder are kept while it is replaced."""
    folder = Path(os.path.abspath(folder))  # "." has no name of its own
    return folder.parent / f".{folder.name}-{state}"

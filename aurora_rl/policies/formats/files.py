"""Drafter checkpoints on disk: ``config.json`` and ``model.safetensors``, in the formats that engines load."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, StrictDataclassError
from torch import Tensor

from aurora_rl.models.loading import ModelError
from aurora_rl.models.parts import TargetParts
from aurora_rl.policies.adapters import merge_adapter
from aurora_rl.policies.drafter import Checkpoint, Drafter, check_draft_vocab, modules_in_float32
from aurora_rl.policies.formats.checks import check_target_depth
from aurora_rl.policies.formats.peft import ADAPTERS, adapter_files
from aurora_rl.policies.formats.vllm import LAYER_IDS
from aurora_rl.policies.registry import DRAFTERS, OWN_NAME, recognized
from aurora_rl.storage import CheckpointError, read_folder, write_folder

_FILES = ("config.json", "model.safetensors")
TRAINED_FOR = "aurora_rl_made_for"
"""Entry of a ``config.json`` with ``Drafter.trained_for``. Engines pass over entries that they do not know."""
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Entries of config.json, or of the objects in it, that name layers of the target.
_ID_LISTS = (LAYER_IDS, "target_layer_ids", "feature_layers")


def save_drafter(drafter: Drafter, folder: str | os.PathLike[str], format: str | None = None) -> None:
    """Write a drafter to a folder, and its adapters, as PEFT has them, to folders of their names in ``adapters``.

    Args:
        drafter: Drafter to write.
        folder: Folder to write to; a drafter in it is replaced.
        format: One of the drafter's ``formats``; None takes the first, in which runs are kept.

    Raises:
        CheckpointError: The drafter has no such format, the format cannot describe it, or the folder holds other files.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.policies import Eagle3Drafter
        >>> from aurora_rl.testing import tiny_target
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16))
        >>> with TemporaryDirectory() as folder:
        ...     save_drafter(drafter, folder, "vllm")
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['config.json', 'model.safetensors']
    """
    folder = Path(folder).expanduser()
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()) and not holds_drafter(folder):
        raise CheckpointError(
            f"{folder} holds other things than a drafter ({' and '.join(_FILES)}), which would be lost; name an empty "
            "or a new folder"
        )
    try:
        tensors, config = written(drafter, format)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    kind = type(drafter)
    if ":" in (path := DRAFTERS.name_of(kind)) and kind.recognizes(named := {OWN_NAME: path, **config}):
        config = named  # it has no name; files as EAGLE's authors have them are known by lacking the entry
    if drafter.trained_for is not None:
        config = {**config, TRAINED_FOR: drafter.trained_for}
    adapters, documents = adapter_files(drafter)
    write_folder(folder, tensors, {"config.json": config, **documents}, adapters)


def holds_drafter(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder holds what :func:`save_drafter` writes, and nothing else."""
    folder = Path(folder)
    return folder.is_dir() and {path.name for path in folder.iterdir()} - {ADAPTERS} == set(_FILES)


def check_format(kind: type[Drafter], format: str) -> None:
    """Raise ValueError if a drafter's class has no such format.

    Example:
        >>> from aurora_rl.policies import MedusaDrafter
        >>> check_format(MedusaDrafter, "vllm")
    """
    if format not in kind.formats:
        raise ValueError(f"{kind.__name__} has no format {format!r}; it has {', '.join(kind.formats)}")


def written(drafter: Drafter, format: str | None = None) -> Checkpoint:
    """Return what :func:`save_drafter` would write, but for adapters.

    Raises:
        ValueError: The drafter has no such format, the format cannot describe it, or the engine of a format that is
            asked for by name cannot serve it.
    """
    if not drafter.formats:
        raise ValueError(f"{type(drafter).__name__} has no formats and is not saved; serve it by its name")
    asked, format = format, format or drafter.formats[0]
    check_format(type(drafter), format)
    # Files name the tokens that have a row, in places without their order.
    check_draft_vocab(drafter.draft_vocab, drafter.vocab_size, "draft_vocab")
    checkpoint = merge_adapter(drafter).write(format)
    # Where no format is asked for, a run keeps what it serves here, whether or not another engine could serve it.
    if asked == "sglang" and 0 in drafter.feature_layers:
        raise ValueError(
            f"the drafter reads layers {tuple(drafter.feature_layers)}, and SGLang cannot read what enters layer 0; "
            "start a drafter of layers from 1 on, such as drafter.feature_layers=[1,2] for a target of three layers"
        )
    return checkpoint


def load_drafter(
    source: str | os.PathLike[str],
    parts: TargetParts,
    kind: type[Drafter] | None = None,
    *,
    format: str | None = None,
    options: Mapping[str, Any] = MappingProxyType({}),
    trained_for: str = "target",
    revision: str | None = None,
    token: str | bool | None = None,
) -> Drafter:
    """Read a drafter for a target, in float32. From then on it is this target's, see ``Drafter.trained_for``.

    Its adapters stay in the folder, for ``peft.read_adapters``. ``kind`` is the drafter's class; None takes that which
    recognizes ``config.json``. Other arguments are those of ``Drafter.from_pretrained``.

    Raises:
        CheckpointError: Files are missing or broken, or the drafter was made for another target. The message names the
            first entry or tensor that does not match.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from aurora_rl.policies import MedusaDrafter
        >>> from aurora_rl.testing import tiny_target
        >>> parts = TargetParts.of(tiny_target())
        >>> with TemporaryDirectory() as folder:
        ...     save_drafter(MedusaDrafter.from_target(parts, draft_vocab=torch.arange(16)), folder)
        ...     type(load_drafter(folder, parts)).__name__
        'MedusaDrafter'
    """
    folder = local_folder(source, revision, token)
    tensors, config = read_folder(folder, "config.json")
    try:
        _check_types(tensors, config)
        stated = config.pop(TRAINED_FOR, None)  # not the class's to keep
        found = _class_of(config, kind)
        for name in found.target_sizes:
            size = getattr(parts.config, name)
            if config.get(name, size) != size:
                raise ValueError(f"config.json: {name} is {config[name]}, the target has {size}")
        format = format or found.formats[0]
        check_format(found, format)
        if kind not in (None, found):
            raise ValueError(
                f"config.json is of {found.__name__}, and {kind.__name__} is asked for; ask for the former, or none"
            )
        with modules_in_float32():
            drafter = found.read(Checkpoint(tensors, config), parts, format, **options)
        check_draft_vocab(drafter.draft_vocab, drafter.vocab_size, "the draft vocabulary")
        if (rows := config.get("draft_vocab_size")) not in (None, len(drafter.draft_vocab)):
            raise ValueError(f"config.json: draft_vocab_size is {rows}, the draft map has {len(drafter.draft_vocab)}")
        _check_layers(drafter, config, parts)
        drafter.trained_for = parts.fingerprint
        if trained_for != "any" and stated not in (None, drafter.trained_for):
            raise ValueError(
                f"config.json: {TRAINED_FOR} is {stated!r}, the target's weights are {drafter.trained_for!r}: the "
                "drafter was trained for others. To start from it nevertheless, set drafter.trained_for=any, in Python "
                "trained_for='any' of from_pretrained"
            )
    except StrictDataclassError as error:  # transformers' own, for an entry of config.json; no ValueError
        raise CheckpointError(f"{folder}/config.json: {error.__cause__ or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:  # an entry that no check above knows
        raise CheckpointError(
            f"{folder}: config.json lacks an entry, or has one of another type: {type(error).__name__}: {error}"
        ) from error
    for name, value in options.items():
        # None stands for a default, which may have been worked out of the target.
        if value is not None and drafter.options.get(name, value) != value:
            raise CheckpointError(f"{folder}: option {name} is {drafter.options[name]!r} there, {value!r} is asked for")
    return drafter


def drafter_class(source: str | os.PathLike[str], kind: type[Drafter] | None = None) -> type[Drafter]:
    """Return the class that recognizes a drafter's folder, or repository on the hub: ``kind`` if it does.

    Raises:
        CheckpointError: It is no checkpoint, or no class knows it.
    """
    folder = local_folder(source)
    _, config = read_folder(folder, "config.json")
    try:
        _check_types({}, config)
        return _class_of(config, kind)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error


@contextlib.contextmanager
def naming_drafters(
    model: str | os.PathLike[str], *, drafter_key: str = "drafter", target_key: str = "model"
) -> Iterator[None]:
    """Name the likely cause where the block cannot load a target: its folder holds a drafter.

    Args:
        model: What the block loads.
        drafter_key: Key or argument that the user gives a drafter by.
        target_key: Key or argument that the user gives the target by.

    Raises:
        ModelError: That of the block, or in its place one that says what to do with the drafter.
    """
    try:
        yield
        return
    except ModelError:
        if (kind := _drafter_in(Path(model).expanduser())) is None:
            raise
    # Not within the block, where the loaders' own texts would be its context.
    raise ModelError(
        f"cannot load model {os.fspath(model)!r}: the folder holds a drafter ({kind.__name__}); give it as "
        f"{drafter_key}, and as {target_key} the language model that it drafts for"
    )


def _drafter_in(folder: Path) -> type[Drafter] | None:
    """Return the class of the drafter in a folder; None if there is none, or any language model would pass for it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        _check_types({}, config)
        kind = recognized(config)
    except (OSError, ValueError):
        return None
    return None if kind.recognizes({"architectures": ["ForCausalLM"]}) and OWN_NAME not in config else kind


def _class_of(config: Mapping[str, Any], kind: type[Drafter] | None) -> type[Drafter]:
    """Return the class of a folder. One that several could have written is of the class that is asked for."""
    return kind if kind is not None and kind.recognizes(config) else recognized(config)


def _check_types(tensors: Mapping[str, Tensor], config: Any) -> None:
    """Raise ValueError naming the first part of a folder that is of another type than any drafter has there."""
    if not isinstance(config, dict):
        raise ValueError(f"config.json must hold an object, got {config!r}")
    for name in ("eagle_config", "dflash_config", "options"):
        if not isinstance(config.get(name, {}), dict | None):
            raise ValueError(f"config.json: {name} must be an object, got {config[name]!r}")
    nested = [config, config.get("eagle_config") or {}, config.get("dflash_config") or {}]
    for names, kind in ((_ID_LISTS, int), (("architectures",), str)):
        for name, value in ((name, entries.get(name)) for entries in nested for name in names):
            if value is not None and not (isinstance(value, list) and all(type(item) is kind for item in value)):
                raise ValueError(f"config.json: {name} must be a list of {kind.__name__}, got {value!r}")
    for name in ("d2t", "draft_id_to_target_id", "token_map"):
        if (ids := tensors.get(name)) is None:
            continue
        if ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 1 or not len(ids):
            found = f"{tuple(ids.shape)} of {ids.dtype}"
            raise ValueError(f"tensor {name!r} must hold an integer for each row of the draft head, got {found}")
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype not in _WEIGHTS:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, quantized without a scale; save it in bfloat16")
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"tensor {name!r} holds values that are not finite; was its training interrupted?")


def _check_layers(drafter: Drafter, config: Mapping[str, Any], parts: TargetParts) -> None:
    """Raise ValueError where a drafter that reads features was made for a target of other layers."""
    depth = parts.config.num_hidden_layers
    if drafter.feature_layers:
        check_target_depth(config.get("num_target_layers"), parts)
    for layer in drafter.feature_layers:
        if not 0 <= layer <= depth:
            raise ValueError(
                f"config.json: the drafter reads what enters layer {layer}, and the target has 0..{depth}, the last of "
                "them its head; was the drafter made for another target?"
            )


def local_folder(source: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Path:
    """Return the folder of a drafter, downloaded if ``source`` names none here."""
    folder = Path(source).expanduser()
    # What has one slash at most may be a repository on the hub; anything else is a folder that is not there.
    if folder.exists() or str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        return folder
    try:
        wanted = ["*.json", "*.safetensors", "pytorch_model.bin"]
        return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{source} is neither a folder nor a repository of the hub: {error}") from error

"""The wire format of trajectories and weights: a JSON header and one raw frame per tensor.

Frame 0 is JSON, so that accepting it from a network executes nothing::

    {"schema": 2, "kind": "trajectory", "meta": {...}, "leaves": [[["sequence", "tokens"], "int64", [17]], ...]}

Frame ``i + 1`` holds the bytes of leaf ``i``: C order, little-endian, no padding. `decode` compares every declaration
with the frames that really arrived before it allocates: the memory it takes never exceeds what the peer paid to send.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

SCHEMA = 2
"""Version of the wire format and of the trajectory layout, in messages and in recordings."""

Key = tuple[str, ...]
Buffer = bytes | memoryview

_MAX_KEY_PARTS = 8
_MAX_NAME = 256  # characters in a key part or a kind
_MAX_META_DEPTH = 8
_DTYPES: dict[str, torch.dtype] = {
    name: dtype
    for name in (
        *("bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64"),
        *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
    )
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)  # older torch lacks some fp8 types
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CodecError(ValueError):
    """A message that cannot be sent, or that arrived malformed. The text is one sentence that names what was wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits on a message that `decode` accepts from a peer.

    Args:
        max_bytes: Total bytes of all frames, header included.
        max_leaves: Tensors in a message.
        max_dims: Dimensions of a tensor.
        max_header_bytes: Bytes of the JSON header.
    """

    max_bytes: int = 1 << 30
    max_leaves: int = 4096
    max_dims: int = 8
    max_header_bytes: int = 1 << 20


DEFAULT_LIMITS = Limits()
OWN_LIMITS = Limits(max_bytes=1 << 62, max_leaves=1 << 20, max_header_bytes=1 << 30)
"""Limits of messages between processes of one run or of one server, which trust each other."""


@dataclass(frozen=True, slots=True)
class Message:
    """A decoded message: kind, small JSON ``meta`` (contents unchecked), and tensors nested by key (batch size [])."""

    kind: str
    meta: dict[str, Any]
    tensors: TensorDict


class _Leaf(NamedTuple):
    key: Key
    dtype: torch.dtype
    shape: tuple[int, ...]


def encode(
    kind: str, meta: Mapping[str, Any] | None = None, tensors: TensorDictBase | Mapping[str | Key, Tensor] | None = None
) -> list[Buffer]:
    """Write a message as frames for a multipart send: the header, and one frame for each tensor.

    Contiguous CPU tensors are not copied: the frames alias their memory, so the caller must not write to them until the
    message has left. Tensors on other devices, and views with gaps, are copied once.

    Args:
        kind: Kind of the message, for example ``"trajectory"``.
        meta: Small JSON values (finite numbers only).
        tensors: TensorDict, or flat mapping whose keys are strings or tuples of strings. Any shape; bool, integer, fp8,
            fp16, bf16, fp32 or fp64.

    Raises:
        CodecError: For a leaf that is not a dense tensor of these types, an unusable key, or ``meta`` that is not JSON.

    >>> frames = encode("weights", {"version": 3}, {("head", "weight"): torch.ones(2, 2, dtype=torch.bfloat16)})
    >>> [len(frame) for frame in frames[1:]]
    [8]
    >>> message = decode(frames)
    >>> message.kind, message.meta["version"], message.tensors["head", "weight"].dtype
    ('weights', 3, torch.bfloat16)
    """
    named = leaves(tensors) if tensors is not None else []
    header = {
        "schema": SCHEMA,
        "kind": kind,
        "meta": dict(meta or {}),
        "leaves": [[list(key), _NAMES[tensor.dtype], list(tensor.shape)] for key, tensor in named],
    }
    try:
        text = json.dumps(header, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CodecError(f"the meta of a {kind!r} message is not plain JSON: {error}") from error
    return [text.encode(), *(_raw(tensor) for _, tensor in named)]


def decode(frames: Sequence[Any], *, limits: Limits = DEFAULT_LIMITS) -> Message:
    """Read a message that came from a peer nobody has reason to trust.

    The tensors own their memory, at the price of one copy: a received ZeroMQ frame is read-only, and writing to a torch
    tensor over a read-only buffer is undefined behaviour. It also gives every tensor torch's own alignment.

    Args:
        frames: Bytes-like objects (``bytes``, ``memoryview``, ``zmq.Frame``) from `encode`.
        limits: Limits of the message.

    Returns:
        The message. The caller checks the meaning of ``meta``, and which tensors are there.

    Raises:
        CodecError: For anything that does not fit, before memory for the tensors is allocated; nothing else is raised.
    """
    if not 1 <= len(frames) <= limits.max_leaves + 1:
        raise CodecError(f"a message has 1 to {limits.max_leaves + 1} frames, this one has {len(frames)}")
    views = [_view(frame) for frame in frames]
    total = sum(view.nbytes for view in views)
    if total > limits.max_bytes:
        raise CodecError(f"a message has at most {limits.max_bytes} bytes, this one has {total}")
    if views[0].nbytes > limits.max_header_bytes:
        raise CodecError(f"a header has at most {limits.max_header_bytes} bytes, this one has {views[0].nbytes}")

    kind, meta, declared = _read_header(views[0])
    if len(declared) != len(views) - 1:
        raise CodecError(f"the header declares {len(declared)} tensors but {len(views) - 1} frames follow it")
    plan = [_read_leaf(entry, view, limits) for entry, view in zip(declared, views[1:], strict=True)]
    _check_keys([leaf.key for leaf in plan])

    nested: dict[str, Any] = {}
    try:
        for leaf, view in zip(plan, views[1:], strict=True):
            node = nested
            for part in leaf.key[:-1]:
                node = node.setdefault(part, {})
            node[leaf.key[-1]] = _owned(leaf, view)
        return Message(kind, meta, TensorDict(nested, batch_size=[]))
    except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as a RuntimeError
        raise CodecError(f"the tensors of a {kind!r} message of {total} bytes cannot be built: {error}") from error


def checksum(tensors: TensorDictBase | Mapping[str | Key, Tensor]) -> str:
    """Hash keys, dtypes, shapes and bytes; equal on every machine, whatever the order, strides or device.

    The result has 32 hexadecimal digits (BLAKE2b, 16 bytes). Tensors and errors are as for `encode`.

    >>> a, b = torch.arange(3), torch.zeros(())
    >>> checksum({"a": a, "b": b}) == checksum({("b",): b, ("a",): a})
    True
    >>> checksum({"a": a}) == checksum({"a": a.int()})
    False
    """
    digest = hashlib.blake2b(digest_size=16)
    for key, tensor in sorted(leaves(tensors), key=lambda leaf: leaf[0]):
        # The line fixes how many bytes follow its end, so no two different sets of tensors hash the same text.
        digest.update(json.dumps([key, _NAMES[tensor.dtype], list(tensor.shape)]).encode() + b"\n")
        digest.update(_raw(tensor))
    return digest.hexdigest()


def leaves(tensors: TensorDictBase | Mapping[str | Key, Tensor]) -> list[tuple[Key, Tensor]]:
    """Return the tensors by full key, all of them fit for the wire; errors as of `encode`."""
    items: Iterable[tuple[Any, Any]] = tensors.items()
    if isinstance(tensors, TensorDictBase):
        # By default a TensorDict passes over its non-tensor data without a word.
        items = tensors.items(True, True, is_leaf=is_leaf_nontensor)
    named = [((key,) if isinstance(key, str) else tuple(key), value) for key, value in items]
    _check_keys([key for key, _ in named])
    for key, value in named:
        if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_nested or value.is_meta:
            raise CodecError(f"the leaf {key} is not a dense tensor but a {type(value).__name__}")
        if value.dtype not in _NAMES:
            raise CodecError(f"the dtype {value.dtype} of leaf {key} cannot be sent; use one of {', '.join(_DTYPES)}")
    return named


def as_tensors(frames: Sequence[Buffer]) -> list[Tensor]:
    """Return frames of `encode` as tensors ``[n]`` uint8, for transports of tensors; those of leaves alias them.

    Example:
        >>> header, leaf = as_tensors(encode("weights", tensors={"head": torch.tensor([1, 2], dtype=torch.uint8)}))
        >>> leaf
        tensor([1, 2], dtype=torch.uint8)
    """
    header, *rest = frames
    # The header is bytes, which PyTorch would not take: they cannot be written to.
    return [
        torch.frombuffer(frame, dtype=torch.uint8) if len(frame) else torch.empty(0, dtype=torch.uint8)
        for frame in (bytearray(header), *rest)
    ]


def _raw(tensor: Tensor) -> Buffer:
    # numpy has no bf16 or fp8, hence the detour through uint8; it needs at least one dimension and one element.
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else b""


def _view(frame: Any) -> memoryview:
    try:
        return memoryview(frame).cast("B")
    except TypeError as error:
        raise CodecError(f"a frame is not a contiguous buffer of bytes but a {type(frame).__name__}") from error


def _read_header(view: memoryview) -> tuple[str, dict[str, Any], list[Any]]:
    try:
        # Decoded here because json.loads guesses UTF-16 and UTF-32 for bytes.
        header = json.loads(bytes(view).decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CodecError(f"the header is not JSON: {short(error)}") from error
    if not isinstance(header, dict) or set(header) != {"schema", "kind", "meta", "leaves"}:
        raise CodecError(
            f"the header is {short(header)}, not an object with exactly the fields schema, kind, meta and leaves"
        )
    schema, kind, meta, declared = header["schema"], header["kind"], header["meta"], header["leaves"]
    if type(schema) is not int or schema != SCHEMA:
        raise CodecError(f"the message has schema {short(schema)}, this side reads {SCHEMA}; use one release on both")
    if not _is_name(kind):
        raise CodecError(f"the kind is not a printable string of 1 to {_MAX_NAME} characters but {short(kind)}")
    if not isinstance(meta, dict) or not _is_shallow(meta):
        raise CodecError(f"the meta is not a JSON object of at most {_MAX_META_DEPTH} levels")
    if not isinstance(declared, list):
        raise CodecError(f"the leaves are not a list but {short(declared)}")
    return kind, meta, declared


def _read_leaf(entry: Any, view: memoryview, limits: Limits) -> _Leaf:
    match entry:
        case [list() as key, name, list() as shape]:
            pass
        case _:
            raise CodecError(f"a leaf is not [key, dtype, shape] but {short(entry)}")
    if not isinstance(name, str) or name not in _DTYPES:
        raise CodecError(f"the leaf {short(key)} has the unknown dtype {short(name)}")
    # A bool is an int to isinstance.
    if len(shape) > limits.max_dims or not all(type(size) is int and 0 <= size < 2**63 for size in shape):
        raise CodecError(
            f"the shape of leaf {short(key)} is not at most {limits.max_dims} integers of 0 to 2**63 - 1"
            f" but {short(shape)}"
        )
    itemsize = _DTYPES[name].itemsize
    # An empty tensor may declare huge other dimensions; torch still multiplies them into strides.
    if math.prod(max(size, 1) for size in shape) * itemsize >= 2**63:
        raise CodecError(f"the shape {short(shape)} of leaf {short(key)} overflows 64 bits")
    if (size := math.prod(shape) * itemsize) != view.nbytes:
        raise CodecError(
            f"the leaf {short(key)} of shape {short(shape)} and dtype {name} has a frame of {view.nbytes} bytes"
            f" instead of {size}"
        )
    if name == "bool" and view.nbytes and np.frombuffer(view, np.uint8).max() > 1:
        raise CodecError(f"the bool leaf {short(key)} holds bytes other than 0 and 1")
    return _Leaf(tuple(key), _DTYPES[name], tuple(shape))


def _owned(leaf: _Leaf, view: memoryview) -> Tensor:
    tensor = torch.empty(leaf.shape, dtype=leaf.dtype)
    if view.nbytes:
        tensor.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(view, np.uint8)
    return tensor


def _check_keys(keys: Sequence[tuple[Any, ...]]) -> None:
    seen: set[Key] = set()
    for key in keys:
        if not 1 <= len(key) <= _MAX_KEY_PARTS or not all(_is_name(part) for part in key):
            raise CodecError(
                f"a key is not 1 to {_MAX_KEY_PARTS} printable strings of 1 to {_MAX_NAME} characters but {short(key)}"
            )
        if key in seen:
            raise CodecError(f"the key {short(key)} occurs twice")
        seen.add(key)
    for key in seen:
        for length in range(1, len(key)):
            if key[:length] in seen:
                raise CodecError(f"the key {short(key[:length])} names a tensor and also holds {short(key)}")


def _is_name(value: Any) -> bool:
    # Printable also excludes the lone surrogates that JSON lets through and that no encoder can write again.
    return isinstance(value, str) and 1 <= len(value) <= _MAX_NAME and value.isprintable()


def _is_shallow(value: Any, levels: int = _MAX_META_DEPTH) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(_is_shallow(child, levels - 1) for child in children)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def field(meta: Mapping[str, Any], name: str, *types: type) -> Any:
    """Return a field of a peer's meta, which must be of one of these types (no bool for an int) and within 64 bits.

    Raises:
        CodecError: It is missing, or something else.
    """
    value = meta.get(name)
    if type(value) not in types or (isinstance(value, int | float) and not abs(value) < 2**63):
        raise CodecError(f"the field {name} is not a {' or '.join(kind.__name__ for kind in types)}")
    return value


def short(value: object) -> str:
    """Format a peer's value for an error message: escaped, and too short to flood a log."""
    text = str(value) if isinstance(value, Exception) else repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

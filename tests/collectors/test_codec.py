"""The codec: bit-exact round trips, and only CodecError for whatever a peer sends."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tracemalloc

import pytest
import torch
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict

from aurora_rl.collectors.codec import OWN_LIMITS, CodecError, Limits, as_tensors, checksum, decode, encode

DTYPES = [
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
    torch.bool,
]
part = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=6)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Any dtype, 0 to 4 dimensions with sizes 0 to 3, random bits: NaN payloads, denormals and infinities included."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=4))
    size = math.prod(shape)
    if dtype is torch.bool:
        return torch.tensor(draw(st.lists(st.booleans(), min_size=size, max_size=size)), dtype=dtype).reshape(shape)
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return bytes(flat.view(torch.uint8).tolist()) if flat.numel() else b""


def wire(frames: list) -> list[bytes]:
    return [bytes(frame) for frame in frames]


def example() -> list[bytes]:
    leaves = {("sequence", "tokens"): torch.arange(5), ("sequence", "hidden"): torch.ones(2, 3, dtype=torch.bfloat16)}
    return wire(encode("trajectory", {"handshake": {"schema": 1}}, leaves))


def with_header(**changes: object) -> list[bytes]:
    frames = example()
    return [json.dumps({**json.loads(frames[0]), **changes}).encode(), *frames[1:]]


def with_leaf(*leaf: object, frame: bytes = b"\0" * 8) -> list[bytes]:
    return [with_header(leaves=[list(leaf)])[0], frame]


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.lists(part, min_size=1, max_size=3).map(tuple), tensors(), max_size=5))
def test_round_trip_is_bit_exact(leaves: dict[tuple[str, ...], torch.Tensor]) -> None:
    conflict = any(a != b and b[: len(a)] == a for a in leaves for b in leaves)
    if conflict:
        with pytest.raises(CodecError, match="names a tensor and also holds"):
            encode("x", {}, leaves)
        return
    message = decode(wire(encode("x", {"n": 1}, leaves)))
    assert (message.kind, message.meta, message.tensors.batch_size) == ("x", {"n": 1}, torch.Size([]))
    read = {(key,) if isinstance(key, str) else key: value for key, value in message.tensors.items(True, True)}
    assert set(read) == set(leaves)
    for key, value in leaves.items():
        assert (read[key].dtype, read[key].shape) == (value.dtype, value.shape)
        assert bits(read[key]) == bits(value)
    assert checksum(message.tensors) == checksum(leaves)


def test_nested_tensordict_strides_parameters_and_zmq_frames() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    td = TensorDict({"a": {"t": base.T, "s": base[:, 1]}, "p": torch.nn.Parameter(torch.ones(2))}, batch_size=[])
    message = decode([zmq.Frame(frame) for frame in encode("x", {}, td)])
    assert torch.equal(message.tensors["a", "t"], base.T)
    assert torch.equal(message.tensors["a", "s"], base[:, 1])
    assert not message.tensors["p"].requires_grad


def test_contiguous_leaves_are_not_copied_and_decoded_ones_own_their_memory() -> None:
    source = torch.zeros(4)
    frames = encode("x", {}, {"a": source})
    source[0] = 1.0
    read = decode(frames).tensors["a"]
    assert read[0] == 1.0  # the frame aliases the source
    read[0] = 2.0
    assert source[0] == 1.0  # the decoded tensor does not alias the frame


def test_frames_travel_as_tensors_too() -> None:
    tensors = {"a": torch.arange(5.0), "none": torch.empty(0, 3), "b": torch.tensor(True)}
    frames = as_tensors(encode("weights", {"n": 1}, tensors))
    assert all(frame.dtype == torch.uint8 and frame.dim() == 1 for frame in frames) and len(frames) == 4
    assert frames[1].data_ptr() == tensors["a"].data_ptr()
    message = decode([frame.numpy() for frame in frames], limits=OWN_LIMITS)
    assert message.meta == {"n": 1} and all(torch.equal(message.tensors[name], tensors[name]) for name in tensors)


def test_message_without_tensors_and_with_empty_frames() -> None:
    assert decode(encode("ack", {"version": 3})).tensors.is_empty()
    assert decode([zmq.Frame(f) for f in encode("x", {}, {"e": torch.empty(0, 7)})]).tensors["e"].shape == (0, 7)


@pytest.mark.parametrize(
    ("leaves", "says"),
    [
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "dtype torch.complex64"),
        ({"a": torch.zeros(2).to_sparse()}, "not a dense tensor"),
        ({"a": torch.empty(2, device="meta")}, "not a dense tensor"),
        ({"a": "text"}, "a str"),
        (TensorDict({"a": {"b": NonTensorData("text")}}, batch_size=[]), "NonTensorData"),
        ({"": torch.zeros(1)}, "a key is not"),
        ({(): torch.zeros(1)}, "a key is not"),
        ({"a\n": torch.zeros(1)}, "a key is not"),
        ({"a": torch.zeros(1), ("a",): torch.zeros(1)}, "occurs twice"),
    ],
)
def test_encode_refuses(leaves: dict, says: str) -> None:
    with pytest.raises(CodecError, match=says):
        encode("x", {}, leaves)


@pytest.mark.parametrize("meta", [{"x": float("nan")}, {"x": object()}, {"x": torch.zeros(1)}])
def test_encode_refuses_meta_that_is_not_json(meta: dict) -> None:
    with pytest.raises(CodecError, match="not plain JSON"):
        encode("x", meta)


LIMITS = Limits(max_bytes=4096, max_leaves=8, max_dims=3, max_header_bytes=1024)
BAD = {
    "no frame": ([], "1 to 9 frames, this one has 0"),
    "too many frames": ([b""] * 10, "this one has 10"),
    "too many bytes": ([example()[0], b"\0" * 4096], "at most 4096 bytes"),
    "large header": ([b" " * 1025], "header has at most 1024"),
    "not a buffer": (["text"], "but a str"),
    "not UTF-8": ([b"\xff\xfe{\0}\0"], "not JSON"),
    "not JSON": ([b"{"], "not JSON"),
    "NaN": ([b'{"schema": NaN}'], "NaN is not JSON"),
    "deep": ([b"[" * 1000], "not JSON"),
    "long integer": ([b"1" * 1000], "exactly the fields"),
    "list": ([b"[1]"], "exactly the fields"),
    "fields": ([b"{}"], "exactly the fields"),
    "schema": (with_header(schema=1), "schema 1, this side reads 2"),
    "schema bool": (with_header(schema=True), "schema True"),
    "kind": (with_header(kind=3), "kind is not"),
    "meta": (with_header(meta=[]), "meta is not"),
    "deep meta": (with_header(meta={"a": [[[[[[[[[]]]]]]]]]}), "meta is not"),
    "leaves": (with_header(leaves={}), "leaves are not a list"),
    "leaf": (with_leaf("a", "int64"), r"not \[key, dtype, shape\]"),
    "leaf dict": (with_leaf(["a"], "int64", {}), r"not \[key, dtype, shape\]"),
    "dtype": (with_leaf(["a"], "complex64", [1]), "unknown dtype 'complex64'"),
    "dtype type": (with_leaf(["a"], ["int64"], [1]), "unknown dtype"),
    "attribute": (with_leaf(["a"], "save", [1]), "unknown dtype"),
    "negative": (with_leaf(["a"], "int64", [-1]), "at most 3 integers of 0"),
    "two negatives": (with_leaf(["a"], "int64", [-1, -1]), "at most 3 integers of 0"),
    "float": (with_leaf(["a"], "int64", [1.0]), "at most 3 integers of 0"),
    "bool": (with_leaf(["a"], "int64", [True]), "at most 3 integers of 0"),
    "many dims": (with_leaf(["a"], "int64", [1, 1, 1, 1]), "at most 3 integers of 0"),
    "huge dim": (with_leaf(["a"], "int64", [2**64]), "at most 3 integers of 0"),
    "overflow": (with_leaf(["a"], "int64", [2**40, 2**40]), "overflows"),
    "empty overflow": (with_leaf(["a"], "int64", [0, 2**62, 4], frame=b""), "overflows"),
    "size": (with_leaf(["a"], "int64", [2]), "frame of 8 bytes instead of 16"),
    "fewer frames": (example()[:-1], "declares 2 tensors but 1 frames"),
    "more frames": ([*example(), b""], "declares 2 tensors but 3 frames"),
    "bool bytes": (with_leaf(["a"], "bool", [8], frame=b"\2" * 8), "other than 0 and 1"),
    "empty key": (with_leaf([], "int64", [1]), "a key is not"),
    "key type": (with_leaf([1], "int64", [1]), "a key is not"),
    "key part": (with_leaf([""], "int64", [1]), "a key is not"),
    "long key": (with_leaf(["a" * 257], "int64", [1]), "a key is not"),
    "surrogate": (with_leaf(["\ud800"], "int64", [1]), "a key is not"),
    "duplicate": ([with_header(leaves=[[["a"], "bool", [1]]] * 2)[0], b"\0", b"\0"], "occurs twice"),
    "prefix": (
        [with_header(leaves=[[["a", "b"], "bool", [1]], [["a"], "bool", [1]]])[0], b"\0", b"\0"],
        "names a tensor and also holds",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_decode_refuses(case: str) -> None:
    frames, says = BAD[case]
    with pytest.raises(CodecError, match=says) as caught:
        decode(frames, limits=LIMITS)
    assert len(str(caught.value)) < 500


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_mutated_messages_raise_nothing_but_codec_error(data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in example()]
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, len(frames) - 1)) if frames else 0
        action = data.draw(st.sampled_from(["flip", "drop", "duplicate", "resize", "swap"]))
        if not frames:
            break
        if action == "flip" and frames[index]:
            at = data.draw(st.integers(0, len(frames[index]) - 1))
            frames[index][at] = data.draw(st.integers(0, 255))
        elif action == "drop":
            del frames[index]
        elif action == "duplicate":
            frames.insert(index, bytearray(frames[index]))
        elif action == "resize":
            frames[index] = frames[index].ljust(data.draw(st.integers(0, 300)), b"\0")[: data.draw(st.integers(0, 300))]
        elif action == "swap":
            frames.reverse()
    try:
        decode(frames)
    except CodecError:
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["schema", "kind", "meta", "leaves", "leaf", "key", "shape"]), json_values)
def test_arbitrary_json_in_the_header_raises_nothing_but_codec_error(field: str, value: object) -> None:
    leaf: list[object] = [["a"], "int64", [1]]
    if field in ("key", "shape"):
        leaf[0 if field == "key" else 2] = value
    header = {"schema": 2, "kind": "x", "meta": {}, "leaves": [leaf]}
    if field == "leaf":
        header["leaves"] = [value]
    elif field in header:
        header[field] = value
    try:
        decode([json.dumps(header).encode(), b"\0" * 8])
    except CodecError:
        pass


def test_declared_sizes_allocate_nothing() -> None:
    frames = with_leaf(["a"], "float64", [2**30, 2**20])  # 2**53 bytes
    tracemalloc.start()
    with pytest.raises(CodecError, match="frame of 8 bytes"):
        decode(frames)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_default_limits_survive_deep_nesting_of_every_kind() -> None:
    for text in (
        b"[" * 500_000,
        b'{"a":' * 200_000,
        b'{"schema":2,"kind":"x","leaves":[],"meta":' + b'{"a":' * 100_000,
    ):
        with pytest.raises(CodecError):
            decode([text])
    with pytest.raises(CodecError, match="not JSON"):
        decode([b"9" * 10_000])  # beyond Python's limit for integers in text


def test_checksum_depends_on_key_dtype_shape_and_bytes_only() -> None:
    a = torch.arange(6, dtype=torch.int32)
    reference = checksum({"a": a, "b": a})
    assert reference == checksum(TensorDict({"b": a, "a": a}, batch_size=[]))
    assert len(reference) == 32
    assert checksum({"a": a.reshape(2, 3).T}) == checksum({"a": a.reshape(2, 3).T.contiguous()})
    variants = [
        {"a": a},
        {"a": a, "c": a},
        {"a": a, "b": a.reshape(2, 3)},
        {"a": a, "b": a.float()},
        {"a": a, "b": a + 1},
    ]
    assert len({reference, *(checksum(changed) for changed in variants)}) == 6
    # A name that looks like a path differs from the path.
    assert checksum({"a.b": a}) != checksum({("a", "b"): a})


def test_checksum_is_the_hash_of_these_bytes() -> None:
    # Written out: engine and learner may run different builds that speak the same schema.
    text = b'[["head", "weight"], "float32", [2]]\n' + struct.pack("<2f", 1.0, -2.0)
    text += b'[["n"], "int64", []]\n' + struct.pack("<q", 7)
    leaves = {"n": torch.tensor(7), ("head", "weight"): torch.tensor([1.0, -2.0])}
    assert checksum(leaves) == hashlib.blake2b(text, digest_size=16).hexdigest()

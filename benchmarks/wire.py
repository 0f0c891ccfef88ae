"""Trajectories of one size through the wire, against other ways to move the same tensors between two processes.

"wire" is ours: a sink, encoding included, to a collector that checks and decodes, over tcp loopback and ipc, with and
without CurveZMQ. The others move the same tensors over plain sockets, with a length before each message: "raw" their
bytes alone, already joined; "pickle5" pickle with out-of-band buffers; "torch.save"; "safetensors". Each receiver ends
with tensors that own their memory; only the wire checks what it gets, and only it and safetensors execute nothing. Ways
take turns. --megabytes is the size of a trajectory, --count their number of a turn, --turns the turns.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import pickle
import socket
import statistics
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from tensordict import TensorDict
from torch import Tensor

from aurora_rl.collectors.collector import ZMQCollector
from aurora_rl.collectors.handshake import Handshake
from aurora_rl.collectors.keys import engine_keys, learner_keys, make_keys
from aurora_rl.collectors.sink import TrajectorySink

HANDSHAKE = Handshake(1, "benchmark", "", (1, 2, 3), "", "eagle3")


def trajectory(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Features and hidden states of a request, of so many bytes together."""
    rows = size // (4 * 1024 * dtype.itemsize)
    return {
        "tokens": torch.arange(rows),
        "features": torch.randn(rows, 3 * 1024).to(dtype),
        "hidden": torch.randn(rows, 1024).to(dtype),
    }


# ---- other ways: how each writes the tensors as buffers, and reads them back ----------------------------------------


def raw(tensors: dict[str, Tensor]) -> list[Any]:
    return [tensor.view(torch.uint8).numpy() for tensor in tensors.values()]


def read_raw(buffers: list[bytearray]) -> object:
    return [torch.frombuffer(buffer, dtype=torch.uint8) for buffer in buffers]


def pickle5(tensors: dict[str, Tensor]) -> list[Any]:
    arrays = {name: (str(tensor.dtype), tensor.view(torch.uint8).numpy()) for name, tensor in tensors.items()}
    buffers: list[pickle.PickleBuffer] = []
    return [pickle.dumps(arrays, protocol=5, buffer_callback=buffers.append), *(each.raw() for each in buffers)]


def read_pickle5(buffers: list[bytearray]) -> object:
    arrays = pickle.loads(buffers[0], buffers=buffers[1:])
    return {name: torch.from_numpy(array).view(getattr(torch, dtype[6:])) for name, (dtype, array) in arrays.items()}


def torch_save(tensors: dict[str, Tensor]) -> list[Any]:
    file = io.BytesIO()
    torch.save(tensors, file)
    return [file.getbuffer()]


def read_torch_save(buffers: list[bytearray]) -> object:
    return torch.load(io.BytesIO(buffers[0]), weights_only=True)


def safetensors(tensors: dict[str, Tensor]) -> list[Any]:
    return [save_safetensors(tensors)]


def read_safetensors(buffers: list[bytearray]) -> object:
    return load_safetensors(bytes(buffers[0]))


OTHERS: dict[str, tuple[Callable[[dict[str, Tensor]], list[Any]], Callable[[list[bytearray]], object]]] = {
    "raw": (raw, read_raw),
    "pickle5": (pickle5, read_pickle5),
    "torch.save": (torch_save, read_torch_save),
    "safetensors": (safetensors, read_safetensors),
}


def receive(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        if not (received := connection.recv_into(view)):
            raise EOFError("the sender has ended")
        view = view[received:]
    return buffer


def send_others(address: Any, way: str, tensors: dict[str, Tensor], count: int) -> None:
    write, _ = OTHERS[way]
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as connection:
        connection.connect(address)
        for _ in range(count):
            buffers = write(tensors)
            sizes = [memoryview(buffer).nbytes for buffer in buffers]
            connection.sendall(struct.pack(f">Q{len(sizes)}Q", len(sizes), *sizes))
            for buffer in buffers:
                connection.sendall(buffer)
        connection.recv(1)  # until all was read


def time_others(transport: str, way: str, tensors: dict[str, Tensor], count: int, folder: Path) -> float:
    """Return the seconds from the first trajectory that was read to the last."""
    path, (_, read) = folder / "socket", OTHERS[way]
    family = socket.AF_UNIX if transport == "ipc" else socket.AF_INET
    with socket.socket(family) as listener:
        listener.bind(str(path) if transport == "ipc" else ("127.0.0.1", 0))
        listener.listen(1)
        with sending(send_others, listener.getsockname(), way, tensors, count + 1):
            connection, _ = listener.accept()
            with connection:
                for number in range(count + 1):
                    (parts,) = struct.unpack(">Q", receive(connection, 8))
                    sizes = struct.unpack(f">{parts}Q", receive(connection, 8 * parts))
                    read([receive(connection, size) for size in sizes])
                    if number == 0:
                        began = time.perf_counter()
                return time.perf_counter() - began


# ---- ours ------------------------------------------------------------------------------------------------------------


def send_wire(address: str, keys: str | None, tensors: dict[str, Tensor], count: int) -> None:
    own = None if keys is None else engine_keys(keys)
    with closing(TrajectorySink(address, handshake=HANDSHAKE, keys=own, capacity=count, max_bytes=1 << 40)) as sink:
        for _ in range(count):
            sink.extend(TensorDict(dict(tensors), batch_size=[]))
        while sink.queued:
            time.sleep(0.001)
        sink.close(60)


def time_wire(transport: str, keys: str | None, tensors: dict[str, Tensor], count: int, folder: Path) -> float:
    """Return the seconds from the first trajectory that was decoded to the last."""
    address = f"ipc://{folder}/wire" if transport == "ipc" else "tcp://127.0.0.1:*"
    own, got = None if keys is None else learner_keys(keys), 0
    collector = ZMQCollector(address, handshake=HANDSHAKE, keys=own, high_water=4)
    try:
        with sending(send_wire, collector.address, keys, tensors, count + 1):
            while not (first := len(collector.poll(60.0))):
                pass
            began, got = time.perf_counter(), first
            while got < count + 1:
                got += len(collector.poll(60.0))
            return (time.perf_counter() - began) * count / (count + 1 - first)
    finally:
        collector.shutdown()


class sending:
    """A process that sends while the block receives."""

    def __init__(self, target: Callable[..., None], *arguments: Any) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=target, args=arguments, daemon=True)

    def __enter__(self) -> None:
        self._process.start()

    def __exit__(self, *_: object) -> None:
        self._process.join(60)
        self._process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=8.0)
    parser.add_argument("--count", type=int, default=64, help="at least 4")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--name", default="wire")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tensors = trajectory(int(options.megabytes * 1e6), getattr(torch, options.dtype))
    size = sum(tensor.nbytes for tensor in tensors.values())
    ways = [(transport, way) for transport in ("tcp", "ipc") for way in ("wire", "wire with CurveZMQ", *OTHERS)]
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        make_keys(f"{name}/keys")
        for turn in range(options.turns):
            for transport, way in ways:
                folder = Path(tempfile.mkdtemp(dir=name))
                if way in OTHERS:
                    took = time_others(transport, way, tensors, options.count, folder)
                else:
                    keys = f"{name}/keys" if way != "wire" else None
                    took = time_wire(transport, keys, tensors, options.count, folder)
                seconds[transport, way].append(took)
                print(f"turn {turn}: {transport} {way}: {options.count * size / took / 1e9:.2f} GB/s", file=sys.stderr)
    rates = {way: [options.count * size / took / 1e9 for took in each] for way, each in seconds.items()}
    table = [
        {
            "transport": transport,
            "way": way,
            "gigabytes_per_second": round(statistics.median(rates[transport, way]), 3),
            "least": round(min(rates[transport, way]), 3),
            "most": round(max(rates[transport, way]), 3),
        }
        for transport, way in ways
    ]
    for row in table:
        print(f"{row['transport']:4} {row['way']:20} {row['gigabytes_per_second']:7.2f} GB/s")
    write_result(__file__, options, {"bytes": size, "table": table})


if __name__ == "__main__":
    main()

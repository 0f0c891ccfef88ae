"""A learner of several processes: rank 0 runs it, and all of them compute its gradient steps.

Rank 0 has the wire, the replay buffer, the gate, the log and the training states. It deals each batch out, and the
other ranks do as it says: compute the gradient of their part, and step. Messages are tensors and JSON, never pickles.

Legend: ``P`` ranks.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives import LossModule
from typing_extensions import override

from aurora_rl.collectors.codec import OWN_LIMITS, as_tensors, checksum, decode, encode
from aurora_rl.objectives import Objective
from aurora_rl.training.checkpoint import TrainingState, training_tensors
from aurora_rl.training.steps import SharedLoss, forget_gradient, gradient
from aurora_rl.trajectories import pack, unpack

_SIGN_S = 5.0  # between signs of life of rank 0 that has nothing to learn from
_BUCKET = 1 << 24  # numbers of gradients that are added at once


class RanksLostError(ConnectionError):
    """Another process of the learner has ended, or has not answered in time."""


class RankCommand(IntEnum):
    """Next action of all ranks, as rank 0 tells them."""

    WAIT = 0
    GRADIENT = 1
    STEP = 2
    GATHER = 3
    END = 4


class Ranks:
    """The processes of a learner, as one of them sees them. PyTorch's default process group is theirs.

    Any two of them must be able to connect to each other, and nobody else: these connections have no keys.

    Attributes:
        rank: Number of this process; that of the learner is 0.
        size: Number of processes ``P``.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._told = time.monotonic()

    def tell(self, command: RankCommand, number: int = 0) -> None:
        """Tell the other ranks what to do, and of which of several things; rank 0 calls this."""
        self._told = time.monotonic()
        with self._reached():
            dist.broadcast(torch.tensor([int(command), number]), 0)

    def hear(self) -> tuple[RankCommand, int]:
        """Wait for what rank 0 tells."""
        told = torch.zeros(2, dtype=torch.int64)
        with self._reached():
            dist.broadcast(told, 0)
        command, number = told.tolist()
        return RankCommand(command), number

    def stay(self) -> None:
        """Let the other ranks know that rank 0 still is there, which may have nothing to learn from for long."""
        if time.monotonic() - self._told > _SIGN_S:
            self.tell(RankCommand.WAIT)

    def send(self, messages: Sequence[Mapping[Any, Tensor] | TensorDictBase]) -> None:
        """Send tensors to each of the other ranks, those of rank 1 first; rank 0 calls this."""
        parts = []  # they must live until they were sent
        with self._reached():
            for rank, tensors in enumerate(messages, start=1):
                frames = as_tensors(encode("tensors", tensors=tensors))
                sizes, found = torch.tensor([len(frame) for frame in frames]), [frame for frame in frames if len(frame)]
                parts += [(dist.isend(part, rank), part) for part in (torch.tensor(len(sizes)), sizes, *found)]
            for work, _ in parts:
                assert work is not None, "this process is of the group"
                work.wait()

    def receive(self) -> TensorDict:
        """Receive the tensors that rank 0 sends to this rank."""
        with self._reached():
            count = torch.tensor(0)
            dist.recv(count, 0)
            sizes = torch.zeros(int(count), dtype=torch.int64)
            dist.recv(sizes, 0)
            frames = [torch.empty(size, dtype=torch.uint8) for size in sizes.tolist()]
            for frame in frames:
                if len(frame):
                    dist.recv(frame, 0)
        return decode([frame.numpy() for frame in frames], limits=OWN_LIMITS).tensors

    def gather(self, figure: Tensor) -> Tensor:
        """Return a figure of every rank, ``[P, ...]``; of each it is a tensor of the same shape and dtype."""
        own = figure.detach().cpu().contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        with self._reached():
            dist.all_gather(found, own)
        return torch.stack(found).to(figure.device)

    def add(self, values: Tensor) -> None:
        """Put the sum over all ranks in the place of values, which have the same shape at each."""
        with self._reached():
            dist.all_reduce(values)

    def leave(self) -> None:
        """Leave the process group."""
        dist.destroy_process_group()

    @contextmanager
    def _reached(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RanksLostError(
                f"rank {self.rank} of {self.size} has lost the others: one of them has ended, and says why, or did not "
                f"answer in time ({_reason(error)}); start all of them again, with --resume"
            ) from error


def _reason(error: RuntimeError) -> str:
    """Return the first sentence of an error of PyTorch."""
    return str(error).partition("\n")[0].partition(". ")[0]


def join(device: torch.device, timeout_s: float = 600.0) -> Ranks:
    """Join the processes that torchrun started.

    Args:
        device: Device that this process learns on, CPU or CUDA.
        timeout_s: Seconds after which a rank that does not answer is taken for lost.

    Raises:
        RanksLostError: Some of them did not come.
    """
    try:
        # Commands, counts and batches go over the CPU, gradients from where they are.
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL and FSDP2 take the current one
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise RanksLostError(f"the processes of the learner did not meet: {_reason(error)}") from error
    return Ranks()


def deal(batch: TensorDictBase, size: int) -> list[TensorDict]:
    """Deal the trajectories of a packed batch out to ``size`` ranks, so that each has about as many tokens.

    A batch of fewer trajectories goes to every rank as a whole: means over it stay what they are.

    Example:
        >>> from aurora_rl.policies import Eagle3Drafter, TargetParts
        >>> from aurora_rl.testing import tiny_target, tiny_trajectory
        >>> drafter = Eagle3Drafter.from_target(TargetParts.of(tiny_target()), draft_vocab=torch.arange(16)).double()
        >>> batch = pack([tiny_trajectory(drafter, request=number) for number in range(3)])
        >>> [part["request"].tolist() for part in deal(batch, 2)]
        [[0, 2], [1]]
    """
    trajectories = unpack(batch)
    if len(trajectories) < size:
        return [pack(trajectories)] * size
    parts: list[list[TensorDict]] = [[] for _ in range(size)]
    tokens = [0] * size
    for trajectory in sorted(trajectories, key=lambda each: len(each["sequence", "tokens"]), reverse=True):
        least = tokens.index(min(tokens))
        parts[least].append(trajectory)
        tokens[least] += len(trajectory["sequence", "tokens"])
    return [pack(part) for part in parts]


class ParallelLoss(SharedLoss):
    """A loss whose batches are dealt out to all ranks. Value and gradient are those of the whole batch.

    Every objective divides by counts of the whole batch, so the sum of the ranks' gradients is its gradient, however
    unlike their parts are. This holds for objectives whose values at a request do not depend on others, as
    ``aurora_rl.testing.check_objective`` asks. Metrics of the built-in objectives are of the whole batch, too.

    Args:
        loss: Loss of packed batches; its objectives are told how to :attr:`~aurora_rl.objectives.Objective.gather`.
        ranks: Processes that learn.
        optimizers: Optimizers of its parameters. Those of the other ranks step whenever these of rank 0 do.
    """

    def __init__(self, loss: LossModule, ranks: Ranks, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        super().__init__()
        self.loss, self.ranks = loss, ranks
        self._compute: Callable[[TensorDictBase], Any] = loss
        self.gather_shards: Callable[[int], None] | None = None
        for each in loss.modules():
            if isinstance(each, Objective):
                each.gather = ranks.gather
        if ranks.rank == 0:
            optimizers[0].register_step_pre_hook(lambda *_: ranks.tell(RankCommand.STEP))

    @override
    def part(self, batch: TensorDictBase) -> TensorDictBase:
        if self.ranks.rank:
            return self.ranks.receive()
        own, *others = deal(batch, self.ranks.size)
        self.ranks.tell(RankCommand.GRADIENT)
        self.ranks.send(others)
        return own

    @override
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of the whole batch, whose gradients are those of this rank's part; and its metrics."""
        out = TensorDict(dict(self._compute(tensordict).items()))
        names = [name for name in out.keys() if name.startswith("loss_")]
        totals = self.ranks.gather(torch.stack([out[name] for name in names])).sum(0)
        for name, total in zip(names, totals, strict=True):
            out[name] = total + (out[name] - out[name].detach())
        return out

    def take_shards(self, compute: Callable[[TensorDictBase], Any], gather: Callable[[int], None]) -> None:
        """Go on with sharded weights, whose gradients are added up in the backward pass.

        Args:
            compute: Computes the loss of a part.
            gather: Takes part in gathering the weights (0), or the states of an optimizer (its number from 1).
        """
        self._compute, self.gather_shards = compute, gather

    @override
    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        if self.gather_shards is not None:
            return
        # What no rank's part has a gradient for stays without, as in a single process: optimizers pass over it.
        there = self.ranks.gather(torch.tensor([p.grad is not None for p in parameters]).long()).any(0)
        for some in _buckets([p for p, learns in zip(parameters, there.tolist(), strict=True) if learns]):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in some])
            self.ranks.add(flat)
            for p, total in zip(some, flat.split([p.numel() for p in some]), strict=True):
                p.grad = total.view_as(p).to(p.dtype)


def _buckets(parameters: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Group parameters whose gradients are added at once: each takes time of its own, and all of them much memory."""
    bucket: list[Tensor] = []
    for parameter in parameters:
        if bucket and sum(p.numel() for p in bucket) + parameter.numel() > _BUCKET:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket


def follow(loss: ParallelLoss, optimizers: Sequence[torch.optim.Optimizer], *, autocast: bool) -> None:
    """Do as rank 0 says, on another rank, until it ends.

    Args:
        loss: Loss, as on rank 0.
        optimizers: Optimizers, as on rank 0.
        autocast: Whether to compute in bfloat16.

    Raises:
        RanksLostError: Rank 0 or another one has ended without a word.
    """
    nothing = TensorDict({}, batch_size=[])
    while True:
        command, number = loss.ranks.hear()
        if command is RankCommand.END:
            return
        if command is RankCommand.STEP:
            for optimizer in optimizers:
                optimizer.step()
        forget_gradient(optimizers)
        if command is RankCommand.GATHER:
            assert loss.gather_shards is not None, "rank 0 gathers shards alone"
            loss.gather_shards(number)
        if command is RankCommand.GRADIENT:
            with suppress(FloatingPointError):  # rank 0 has it too, and decides
                gradient(loss, optimizers, nothing, autocast=autocast)


def start_alike(
    loss: ParallelLoss, optimizers: list[torch.optim.Optimizer], settings: Mapping[str, Any] | None = None
) -> None:
    """Give every rank the weights, the optimizer states and the objectives' buffers of rank 0.

    Args:
        loss: Loss, made alike on all ranks, which all call this.
        optimizers: Optimizers of its drafter's parameters.
        settings: Settings that make steps differ, as JSON takes them, by their names: those of the objectives, and the
            dtype of autocast. Names of objectives, the drafter's architecture and what the optimizers have in their
            groups are compared in any case.

    Raises:
        ValueError: Another rank has other settings, another head of the target, or another draft vocabulary. Every
            rank raises the same.
    """
    ranks, objectives = loss.ranks, [each for each in loss.modules() if isinstance(each, Objective)]
    drafter, head = objectives[0].drafter, objectives[0].head
    parts = {
        "objectives": [each.name for each in objectives],
        "drafter": type(drafter).__name__,
        "feature_layers": list(drafter.feature_layers),
        **_in_groups(optimizers),
    }
    _check_alike(ranks, parts | dict(settings or {}))
    digest = bytes.fromhex(checksum(head.tensors() | {"draft_vocab": drafter.draft_vocab}))
    digests = ranks.gather(torch.tensor(list(digest)))
    if len(unlike := (digests != digests[0]).any(1).nonzero()[:, 0]):
        raise ValueError(
            f"rank {int(unlike[0])} has another target or draft vocabulary than rank 0; give all hosts the same model "
            "and the same drafter.path"
        )
    buffers = {
        f"objective.{index}.{name}": buffer
        for index, each in enumerate(objectives)
        for name, buffer in each.named_buffers(recurse=False)
    }
    if ranks.rank == 0:
        ranks.send([{**training_tensors(drafter, optimizers), **buffers}] * (ranks.size - 1))
        return
    tensors: dict[str, Tensor] = dict(ranks.receive().items())
    TrainingState(Path("rank 0"), {}, {n: t for n, t in tensors.items() if n not in buffers}).stage(
        drafter, optimizers
    )()
    for name, buffer in buffers.items():
        buffer.copy_(tensors[name])


def _in_groups(optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Return the hyperparameters of optimizers, and how many numbers learn by them, each by a name of its own."""
    found: dict[str, Any] = {"optimizers": [type(optimizer).__name__ for optimizer in optimizers]}
    for number, optimizer in enumerate(optimizers):
        for index, group in enumerate(optimizer.param_groups):
            for name, value in {**group, "params": sum(p.numel() for p in group["params"])}.items():
                found[f"optimizers[{number}].param_groups[{index}].{name}"] = value
    return found


def _check_alike(ranks: Ranks, settings: Mapping[str, Any]) -> None:
    """Raise ValueError on all ranks if the settings of one are not those of rank 0."""
    values = {name: json.dumps(value, sort_keys=True, default=str) for name, value in settings.items()}
    own = torch.tensor(list(json.dumps(values).encode()), dtype=torch.uint8)
    sizes = ranks.gather(torch.tensor(len(own)))
    texts = ranks.gather(torch.cat([own, own.new_zeros(int(sizes.max()) - len(own))]))
    first, *others = (json.loads(bytes(text[:size].tolist())) for text, size in zip(texts, sizes.tolist(), strict=True))
    for rank, found in enumerate(others, start=1):
        if names := [name for name in {**first, **found} if first.get(name) != found.get(name)]:
            unlike = ", ".join(f"{name}={found.get(name)} (rank 0 has {first.get(name)})" for name in names)
            raise ValueError(f"rank {rank} has {unlike}; start all ranks with the same configuration")

"""The processes of a learner that torchrun starts: which one this is, and whether they can learn together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from aurora_rl.cli.config import Config
from aurora_rl.cli.errors import ConfigError

_BY_TORCHRUN = "TORCHELASTIC_RUN_ID"
_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_START = "torchrun --nproc-per-node 2 -m aurora_rl.cli.main learn learner.parallel=ddp"


@dataclass(frozen=True, slots=True)
class Place:
    """The place of this process among ``size`` of a learner: rank 0 has the wire, ``local_rank`` counts on its host."""

    rank: int
    size: int
    local_rank: int


def place_of(config: Config, environment: Mapping[str, str] = os.environ) -> Place | None:
    """Return the place of this process as torchrun sets it in the environment; None if one process learns.

    Raises:
        ConfigError: ``learner.parallel`` and the environment do not go together.

    Example:
        >>> from aurora_rl.cli.config import load_config
        >>> started = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")
        >>> place_of(load_config(overrides=["learner.parallel=ddp"]), started)
        Place(rank=1, size=2, local_rank=1)
    """
    parallel, batch_size = config.learner.parallel, config.learner.batch_size
    if parallel is None:
        if _BY_TORCHRUN in environment and (size := int(environment.get("WORLD_SIZE", 1))) > 1:
            raise ConfigError(
                f"torchrun started {size} processes, and learner.parallel=null is for one; set learner.parallel=ddp"
            )
        return None
    if missing := [name for name in _NEEDED if name not in environment]:
        raise ConfigError(
            f"learner.parallel={parallel} is for processes that torchrun starts, and {missing[0]} is not in the "
            f"environment; start them by `{_START}`, or set learner.parallel=null"
        )
    rank, size, local_rank = (int(environment[name]) for name in _NEEDED[:3])
    if size > batch_size:
        raise ConfigError(
            f"learner.parallel={parallel}: {size} processes are more than the learner.batch_size={batch_size} requests "
            f"of a step; start {batch_size} or fewer, or set learner.batch_size={size} or more"
        )
    return Place(rank, size, local_rank)


def own_device(config: Config, place: Place) -> str:
    """Return the device of a process of a learner: a GPU of its own, or the CPU. It needs torch.

    Raises:
        ConfigError: The host has fewer GPUs than processes, the device is one that processes cannot share a gradient
            on, or this build of PyTorch cannot connect processes.
    """
    import torch
    import torch.distributed.fsdp

    parallel = f"learner.parallel={config.learner.parallel}"
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        raise ConfigError(f"{parallel} needs a build of PyTorch with torch.distributed and gloo; set it to null")
    if config.learner.parallel == "fsdp" and not hasattr(
        torch.distributed.fsdp.FSDPModule, "set_reduce_scatter_unused_params"
    ):
        raise ConfigError(f"{parallel} needs PyTorch 2.13, this is {torch.__version__}; set learner.parallel=ddp")
    kind = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "cuda"):
        raise ConfigError(f"{parallel} needs device=cpu, cuda or auto, got {config.device!r}: each process has its own")
    if kind == "cpu":
        return kind
    if place.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"{parallel}: process {place.local_rank} of this host has no GPU, there are {torch.cuda.device_count()}; "
            f"start torchrun with --nproc-per-node {torch.cuda.device_count()} or less, or set device=cpu"
        )
    return f"cuda:{place.local_rank}"


def refuse_parallel(config: Config, command: str) -> None:
    """Raise ConfigError for a command that learns in one process, or starts such a learner."""
    if config.learner.parallel is not None:
        raise ConfigError(
            f"learner.parallel={config.learner.parallel} is of aurora-rl learn, and {command} is one process; "
            f"leave it out, or start the learner by `{_START}` and serve with learner.spawn=false"
        )

"""New drafter weights into SGLang's draft runner, and back out to see that they are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aurora_rl.envs.remote.checks import FUSED
from aurora_rl.envs.remote.session import SwapError


class Shard(NamedTuple):
    """A view of a rank's parameter, and the same part of the published tensor, of the same shape."""

    held: Tensor
    published: Tensor


@torch.no_grad()
def swap_weights(
    updater: Any, runner: Any, weights: Mapping[str, Tensor], agree: Callable[[str], str] = lambda fault: fault
) -> None:
    """Replace the drafter's weights between two batches, in the draft runner alone.

    Every rank of a server calls it with the same weights, and SGLang loads the rank's shard of each. It is read back
    and compared bit by bit. If any rank has a fault, the tensors of all are what they were before.

    Args:
        updater: SGLang's manager of weight updates, in which no session may be open.
        runner: SGLang's runner of the draft model.
        weights: Tensors by checkpoint names, each of the shape that the drafter publishes and of any floating dtype,
            without the draft map, which must not change.
        agree: Takes this rank's fault, empty if there is none, and returns a fault of any rank. Called exactly once.

    Raises:
        SwapError: A rank does not hold the weights. The message is what ``agree`` returned.
    """
    fault, opened = "", False
    shards: dict[str, Shard] = {}
    before: dict[str, Tensor] = {}
    try:
        if getattr(updater, "_session", None) is not None:
            raise SwapError("somebody else's weight update is under way in SGLang; end it")
        torch.get_device_module(runner.device).synchronize()  # the batch before may still be reading
        shards_of(runner.model, weights)  # SGLang skips names that it does not know
        # Not by SGLang's session, whose barriers a rank with a fault would not reach. It only marks what is open from
        # one request to the next, and this begins and ends between two of them.
        runner.weight_updater.begin_weight_update()
        opened = True
        shards = shards_of(runner.model, weights)
        before = {name: shard.held.clone() for name, shard in shards.items()}
        loaded, message = runner.weight_updater.update_weights_from_tensor(named_tensors=list(weights.items()))
        if not loaded:
            raise SwapError(f"SGLang did not load the weights: {message}")
        # Before the update ends: what follows may pack weights for the hardware.
        for name, (held, published) in shards.items():
            if not torch.equal(held, published.to(held)):
                raise SwapError(f"{name!r} in SGLang's drafter is not what was loaded")
    except SwapError as error:
        fault = str(error)
    except Exception as error:
        fault = f"{type(error).__name__}: {error}"
    agreed = False
    try:
        if reason := agree(fault):
            raise SwapError(reason)
        agreed = True
    finally:
        if not agreed:  # also where a rank did not answer
            for name, tensor in before.items():
                shards[name].held.copy_(tensor)
        if opened:
            runner.weight_updater.end_weight_update(run_post_load=False)


def shards_of(model: Any, weights: Mapping[str, Tensor]) -> dict[str, Shard]:
    """Return what this rank's draft model holds of each of the published tensors.

    Args:
        model: SGLang's draft model.
        weights: Published tensors by checkpoint names, each whole: a matrix is ``[rows, columns]``, a norm ``[size]``.

    Returns:
        The rank's part by the same names. Of a matrix that is split among ranks it has fewer rows, or fewer columns.

    Raises:
        SwapError: The model has no parameter for a tensor, or one that it is not a part of.
    """
    held = {name: parameter.data for name, parameter in model.named_parameters()}
    found = {}
    for name, tensor in weights.items():
        inside = name.replace("midlayer.", "layers.0.")
        place = next((place for place in _places(inside) if place.name in held), None)
        if place is None:
            raise SwapError(f"SGLang's drafter has no parameter for {name!r}")
        whole, owner = held[place.name], model.get_submodule(place.name.rpartition(".")[0])
        if place.fused:
            whole = whole.split(_part_sizes(model, place.name, place.fused, len(whole)))[place.part]
        if (shard := _shard(owner, whole, tensor)) is None:
            size = getattr(owner, "tp_size", 1)
            shared = f" on each of {size} ranks" if size > 1 else ""
            raise SwapError(f"{name!r} has shape {tuple(tensor.shape)}, SGLang's drafter {tuple(whole.shape)}{shared}")
        found[name] = shard
    return found


class _Place(NamedTuple):
    """A parameter that may hold a tensor: its name, and of a fused one the projection and the tensor's part of it."""

    name: str
    fused: str = ""
    part: int = 0


def _places(name: str) -> list[_Place]:
    fused = [
        _Place(prefix + name.replace(part, whole), whole, number)
        for whole, parts in FUSED.items()
        for number, part in enumerate(parts)
        if f".{part}." in name
        for prefix in ("", "model.")
    ]
    return [*fused, _Place(name), _Place(f"model.{name}")]


def _part_sizes(model: Any, name: str, fused: str, rows: int) -> list[int]:
    """Return the number of rows of each part of a fused projection."""
    if fused == "gate_up_proj":
        return [rows // 2, rows // 2]
    attention = model.get_submodule(name.split(".self_attn.")[0] + ".self_attn")
    return [attention.q_size, attention.kv_size, attention.kv_size]


def _shard(owner: Any, held: Tensor, published: Tensor) -> Shard | None:
    """Return the rank's part of a tensor by the layout of the module that holds it; None if it does not fit."""
    if (rows := getattr(owner, "shard_indices", None)) is not None:  # split by vocabulary, with padding after its rows
        if published.shape != (owner.org_vocab_size, *held.shape[1:]):
            return None
        published = published[rows.org_vocab_start_index : rows.org_vocab_end_index]
        return Shard(held[: len(published)], published)
    if held.shape == published.shape:
        return Shard(held, published)
    split = [dim for dim, sizes in enumerate(zip(held.shape, published.shape, strict=False)) if sizes[0] != sizes[1]]
    if held.dim() != published.dim() or len(split) != 1:
        return None
    own, whole, size = held.shape[split[0]], published.shape[split[0]], getattr(owner, "tp_size", 1)
    count = whole // own  # fewer than ranks where several hold the same key heads
    if own * count != whole or count > size or size % count:
        return None
    return Shard(held, published.narrow(split[0], own * (owner.tp_rank * count // size), own))


def draft_vocab(worker: Any) -> Tensor:
    """Return the target's token of each row of the head of a draft worker of SGLang, ``[Vd]`` int64."""
    rows, config = worker.hot_token_id, worker.draft_runner.model.config
    if rows is None:  # EAGLE's configuration has the target's vocabulary alone
        return torch.arange(getattr(config, "draft_vocab_size", config.vocab_size))
    return rows.cpu().to(torch.int64)

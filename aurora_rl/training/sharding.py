"""Weights, gradients and optimizer states in shards, one on each rank, by PyTorch's FSDP2.

A rank has whole weights during forward and backward alone. Rank 0 asks for whole tensors when it publishes or saves:
they are gathered one after the other, and go to the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torchrl.objectives import LossModule
from typing_extensions import override

from aurora_rl.policies import Drafter
from aurora_rl.training.parallel import ParallelLoss, RankCommand


class _Forward(nn.Module):
    """A drafter and its loss as a module that returns tensors: FSDP2 makes its weights whole while it runs."""

    def __init__(self, drafter: Drafter, loss: LossModule) -> None:
        super().__init__()
        self.drafter = drafter
        self._loss = loss.__call__  # no submodule: FSDP2 asks modules for what TorchRL's do not take

    @override
    def forward(self, batch: TensorDictBase) -> dict[str, Tensor]:
        return dict(self._loss(batch).items())


def shard(loss: ParallelLoss, drafter: Drafter, optimizers: list[torch.optim.Optimizer]) -> None:
    """Shard a drafter, its gradients and the states of its optimizers over the ranks, in place.

    All ranks call this after ``start_alike``. From then on ``state_dict`` of drafter and optimizers on rank 0 gathers
    whole tensors from all ranks, on the CPU. Copies by ``serving_copy`` have the weights from before, until others are
    installed.

    Args:
        loss: Loss of the ranks.
        drafter: Drafter in training.
        optimizers: Optimizers of its parameters.
    """
    device = drafter.draft_vocab.device
    whole = drafter.serving_copy(next(drafter.parameters()).dtype, torch.device("cpu"))
    names: dict[Tensor, str] = {parameter: name for name, parameter in drafter.named_parameters()}
    mesh, forward = init_device_mesh(device.type, (loss.ranks.size,)), _Forward(drafter, loss.loss)
    # One unit: a drafter has few layers, and the loss reads weights of its head outside of its forward passes.
    frozen = {parameter for parameter in forward.parameters() if not parameter.requires_grad}
    sharded = fully_shard(forward, mesh=mesh, reshard_after_forward=False, ignored_params=frozen)
    sharded.set_gradient_divide_factor(1.0)  # gradients add up to that of the whole batch
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no other
    sharded.set_reduce_scatter_unused_params(True)  # the parts of a batch need not reach the same weights
    shards: dict[str, Tensor] = dict(drafter.named_parameters())
    for optimizer in optimizers:
        states = {
            shards[names[parameter]]: {name: _part(value, parameter, mesh) for name, value in state.items()}
            for parameter, state in optimizer.state.items()
        }
        for group in optimizer.param_groups:
            group["params"] = [shards[names[parameter]] for parameter in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(states)

    def gather(number: int) -> None:
        for value in _shards(optimizers[number - 1].state_dict() if number else drafter.state_dict()):
            value.full_tensor()

    loss.take_shards(forward, gather)
    if loss.ranks.rank == 0:
        _return_whole(loss, drafter, optimizers)

        def serving_copy(dtype: torch.dtype, device: torch.device | None = device) -> Drafter:
            return whole.serving_copy(dtype, device)

        drafter.serving_copy = serving_copy  # type: ignore[method-assign]


def _part(value: Any, parameter: Tensor, mesh: DeviceMesh) -> Any:
    """Return this rank's shard of an optimizer's state of a parameter; a number stays as it is."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value, mesh, [Shard(0)], src_data_rank=None)


def _return_whole(loss: ParallelLoss, drafter: Drafter, optimizers: list[torch.optim.Optimizer]) -> None:
    """Have ``state_dict`` of drafter and optimizers return whole tensors on rank 0."""

    def of_drafter(module: nn.Module, state: dict[str, Any], prefix: str, metadata: dict[str, Any]) -> None:
        loss.ranks.tell(RankCommand.GATHER, 0)
        state.update(zip(state, _gathered(state.values()), strict=True))

    drafter.register_state_dict_post_hook(of_drafter)
    for number, optimizer in enumerate(optimizers, start=1):

        def of_optimizer(_: Any, found: dict[str, Any], number: int = number) -> dict[str, Any]:
            loss.ranks.tell(RankCommand.GATHER, number)
            states = {
                index: dict(zip(state, _gathered(state.values()), strict=True))
                for index, state in found["state"].items()
            }
            return {**found, "state": states}

        optimizer.register_state_dict_post_hook(of_optimizer)


def _shards(state: dict[str, Any]) -> Iterator[DTensor]:
    """Return the shards in a ``state_dict`` of a module or of an optimizer, in its order."""
    for value in state.values():
        if isinstance(value, dict):
            yield from _shards(value)
        elif isinstance(value, DTensor):
            yield value


def _gathered(values: Iterable[Any]) -> list[Any]:
    """Gather sharded tensors one after the other, to the CPU; anything else stays as it is. All ranks call this."""
    return [value.full_tensor().detach().cpu() if isinstance(value, DTensor) else value for value in values]

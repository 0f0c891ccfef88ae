"""Writes to parameters are noticed, whoever makes them, and packed weights follow."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.weight_update import WeightStrategy

from aurora_rl.models.inference_modules import PackedLinear, prepare_for_inference, stage
from aurora_rl.models.weight_watch import WatchedParameter, WeightWatch

native_bf16 = pytest.mark.skipif(
    not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="this CPU does not multiply bf16 natively, so it packs float32 alone",
)


def model(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 16), nn.Linear(16, 8, bias=False)).to(dtype)


def step(module: nn.Module, new: nn.Module) -> None:
    """Have an optimizer make the parameters those of ``new``, or nearly."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for own, target in zip(module.parameters(), new.parameters(), strict=True):
        own.grad = (own - target).detach()
    optimizer.step()


def to_module(module: nn.Module, new: nn.Module) -> None:
    TensorDict.from_module(new).to_module(module)


WAYS: dict[str, Callable[[nn.Module, nn.Module], object]] = {
    "load_state_dict": lambda module, new: module.load_state_dict(new.state_dict()),
    "load_state_dict, assigned": lambda module, new: module.load_state_dict(new.state_dict(), assign=True),
    "TensorDict.update_": lambda module, new: TensorDict.from_module(module).data.update_(TensorDict.from_module(new)),
    "TensorDict.to_module": to_module,
    "TorchRL in place": lambda module, new: WeightStrategy().apply_weights(module, TensorDict.from_module(new).data),
    "TorchRL by reference": lambda module, new: WeightStrategy().apply_weights(
        module, TensorDict.from_module(new).data, inplace=False
    ),
    "stage": lambda module, new: stage(module, new.state_dict())(),
    "an optimizer": step,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, pytest.param(torch.bfloat16, marks=native_bf16)])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_writing_is_noticed_once(way: str, dtype: torch.dtype) -> None:
    module, x = model(dtype), torch.randn(3, 32, dtype=dtype)
    prepare_for_inference(module, keep_weights=True)
    assert isinstance(module[0], PackedLinear) == (dtype != torch.float64)
    watch = WeightWatch(module)
    for seed in (1, 2):  # the parameters that took the place of others are watched, too
        assert not watch.written()
        new = model(dtype, seed)
        WAYS[way](module, new)
        assert watch.written() and not watch.written()
        with torch.inference_mode():
            torch.testing.assert_close(module(x), new(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=native_bf16)])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])  # on a CPU, SGD writes no bf16 if fused
def test_steps_of_a_fused_optimizer_are_noticed_though_torch_counts_none(
    kind: type[torch.optim.Optimizer], dtype: torch.dtype
) -> None:
    module, x = model(dtype), torch.randn(3, 32, dtype=dtype)
    prepare_for_inference(module, keep_weights=True)
    watch = WeightWatch(module)
    optimizer = kind(module[0].parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
    for _ in range(2):
        for parameter in module[0].parameters():
            parameter.grad = torch.ones_like(parameter)
        before = module[0].weight.detach().clone()
        optimizer.step()
        assert watch.written() and not watch.written()
        assert not torch.equal(module[0].weight, before)
        expected = nn.functional.linear(x, module[0].weight, module[0].bias)
        with torch.inference_mode():
            torch.testing.assert_close(module[0](x), expected, atol=0.02, rtol=0.02)
    optimizer.zero_grad()
    optimizer.step()
    assert not watch.written()


def test_one_entry_of_one_parameter_is_enough() -> None:
    module = model()
    watch = WeightWatch(module)
    module[1].weight.data[3, 4] = 7.0
    assert watch.written()
    module[0].bias.data = torch.zeros(16)
    assert watch.written()
    module[0].bias.data.numpy()[:] = 1.0  # what nobody counts, and the page says so
    assert not watch.written()


def test_an_optimizer_that_was_there_before_keeps_its_parameters() -> None:
    module = model()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    before = list(module.parameters())
    watch = WeightWatch(module)
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    module(torch.randn(2, 32)).sum().backward()
    optimizer.step()
    assert watch.written()


def test_a_watched_parameter_is_a_parameter_everywhere_else() -> None:
    module = model()
    WeightWatch(module)
    copied, sent = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    for copy_of in (copied, sent, module.to(torch.float64).to(torch.float32)):
        assert all(isinstance(each, nn.Parameter) for each in copy_of.parameters())
        assert all(torch.equal(a, b) for a, b in zip(copy_of.parameters(), model().parameters(), strict=True))
    with torch.no_grad():
        copied[0].weight.zero_()
    assert isinstance(module[0].weight, WatchedParameter) and bool(module[0].weight.any())


def test_parameters_made_in_inference_mode_are_left_alone() -> None:
    with torch.inference_mode():
        module = model()
    assert not WeightWatch(module).written()


@native_bf16
def test_new_weights_take_the_place_of_those_made_in_inference_mode() -> None:
    new, x = model(torch.bfloat16, seed=1), torch.randn(3, 32).bfloat16()
    with torch.inference_mode():
        module = nn.Sequential(model(torch.bfloat16)[0])
        prepare_for_inference(module, keep_weights=True)
    watch = WeightWatch(module)
    stage(module, new[:1].state_dict())()
    watch.accept()
    assert not watch.written()
    with torch.inference_mode():
        torch.testing.assert_close(module(x), new[0](x), atol=0.02, rtol=0.02)


@native_bf16
def test_gradients_go_through_a_packed_layer_that_keeps_its_weight() -> None:
    module, plain, x = model(torch.bfloat16), model(torch.bfloat16), torch.randn(3, 32).bfloat16()

    def gradients(each: nn.Module) -> list[Tensor]:
        return list(torch.autograd.grad(each(x).float().square().sum(), list(each.parameters())))

    expected = gradients(plain)
    prepare_for_inference(module, keep_weights=True)
    names = [name for name, _ in module.named_parameters()]
    found = dict(zip(names, gradients(module), strict=True))
    for (name, _), gradient in zip(plain.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name], gradient)


@native_bf16
def test_copies_and_casts_of_a_packed_layer_are_of_its_weight_now() -> None:
    module, new, x = model(torch.bfloat16), model(torch.bfloat16, seed=1), torch.randn(3, 32).bfloat16()
    prepare_for_inference(module, keep_weights=True)
    module.requires_grad_(False)
    module.load_state_dict(new.state_dict())
    torch.testing.assert_close(module(x), new(x), atol=0.02, rtol=0.02)  # at once, without a watch
    with torch.no_grad():
        module[0].weight.zero_()
    served = copy.deepcopy(module).to(torch.bfloat16)
    assert torch.equal(served[0](x), module[0].bias.expand(3, -1))
    plain = copy.deepcopy(module).float()
    assert torch.equal(plain[0](x.float()), module[0].bias.float().expand(3, -1))
    assert torch.equal(plain.bfloat16()[0](x), module[0].bias.expand(3, -1))


@native_bf16
@pytest.mark.parametrize("way", WAYS)
def test_a_packed_layer_follows_its_weight_before_a_watch_is_asked(way: str) -> None:
    """A drafter that learns is validated between a step and the next round, without gradients."""
    module, x = model(torch.bfloat16), torch.randn(3, 32).bfloat16()
    prepare_for_inference(module, keep_weights=True)
    WeightWatch(module)
    for seed in (1, 2):
        new = model(torch.bfloat16, seed)
        WAYS[way](module, new)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                torch.testing.assert_close(module(x), new(x), atol=0.02, rtol=0.02)

"""HeadLogits is the product to whoever reads it, and costs nothing to whoever does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora_rl.policies import HeadLogits

READS: dict[str, Callable[[Any], Any]] = {
    "method": lambda logits: logits.log_softmax(-1),
    "function in a list": lambda logits: torch.stack([logits, logits]),
    "argument": lambda logits: torch.where(torch.tensor([[True], [False]]), logits, 1.0),
    "index": lambda logits: logits[1, 2],
    "operator": lambda logits: 1 - logits,
    "alone in an operator": lambda logits: logits @ logits.T,
    "shape": lambda logits: torch.tensor(logits.shape),
    "length": lambda logits: torch.tensor(len(logits)),
    "numpy": lambda logits: torch.tensor(logits.detach().numpy()),
}


def parts() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)


@pytest.mark.parametrize("read", READS)
def test_every_operation_sees_the_product(read: str) -> None:
    states, weight = parts()
    got = READS[read](HeadLogits(states, weight))
    assert type(got) is Tensor and torch.equal(got, READS[read](states @ weight.T))


def test_gradients_reach_states_and_weight() -> None:
    states, weight = parts()
    logits = HeadLogits(states, weight)
    assert logits.requires_grad and logits.dtype == torch.float32
    got = torch.autograd.grad(logits.square().sum(), (states, weight))
    expected = torch.autograd.grad((states @ weight.T).square().sum(), (states, weight))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_rows_may_have_heads_of_their_own() -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(4, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    head_of = torch.tensor([2, 0, 2, 1, 0, 0])  # the last head has no row
    logits = HeadLogits(states, weights, head_of)
    expected = torch.stack([weights[head] @ state for state, head in zip(states, head_of.tolist(), strict=True)])
    torch.testing.assert_close(logits + 0, expected)
    place = torch.tensor([5, 0, 2, 2])
    some = logits.some(place)
    assert some.shape == (4, 4) and "product" not in vars(some)
    torch.testing.assert_close(some + 0, expected[place])
    gradients = [
        torch.autograd.grad(each.square().sum(), (states, *weights[:3]), retain_graph=True)
        for each in (logits, expected)
    ]
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match=r"head_of must lie in 0 .. 3, got \[2, 3, 4\]"):
        HeadLogits(states, weights, head_of + 2) + 0


def test_nothing_is_multiplied_before_it_is_read_and_nothing_twice() -> None:
    logits = HeadLogits(*parts())
    assert logits.shape == (2, 4) and "product" not in vars(logits)
    assert logits.product is logits.product


def test_gradients_are_kept_where_it_was_made_and_not_where_it_is_read() -> None:
    logits = HeadLogits(*parts())
    with torch.no_grad():
        logits.amax()
        frozen = HeadLogits(*parts())
    assert logits.sum().requires_grad and not frozen.sum().requires_grad


def test_the_product_is_in_autocasts_dtype() -> None:
    logits = HeadLogits(*parts())
    with torch.autocast("cpu", torch.bfloat16):
        assert logits.dtype == torch.bfloat16

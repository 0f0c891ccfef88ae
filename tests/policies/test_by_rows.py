"""A function called for some rows at a time: values and gradients are those of one call, also under autocast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from aurora_rl.policies.by_rows import by_rows


@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_gradients_are_those_of_one_call(size: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4).double()
    x, keys = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 5, 4, dtype=torch.float64)
    numbers = torch.arange(14).view(2, 7)  # rows that have no gradient
    unused = nn.Parameter(torch.zeros(1))
    x.requires_grad_()
    keys.requires_grad_()
    spans: list[slice] = []

    def function(span: slice, x: Tensor, numbers: Tensor, keys: Tensor) -> Tensor:
        spans.append(span)
        return (layer(x) @ keys.mT).softmax(-1) @ keys * numbers[..., None]

    learns = [x, keys, *layer.parameters()]
    whole = function(slice(7), x, numbers, keys)
    direction = torch.randn_like(whole)
    expected = torch.autograd.grad(whole, learns, direction)
    spans.clear()
    found = by_rows(function, size, [x, numbers], [keys], [*layer.parameters(), unused])
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(torch.autograd.grad(found, learns, direction), expected)
    assert len(spans) == 2 * -(-7 // size)  # each once more in the backward pass


def test_it_computes_as_autocast_says_and_leaves_no_weights_without_gradients() -> None:
    layer, x = nn.Linear(8, 8), torch.randn(1, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = by_rows(lambda span, x: layer(x), 2, [x], [], list(layer.parameters()))
        whole = layer(x)
    assert found.dtype == torch.bfloat16 and torch.equal(found, whole)
    grads = [torch.autograd.grad(out.float().square().sum(), layer.weight)[0] for out in (found, whole)]
    # Parts of the sum are rounded to bfloat16 each.
    torch.testing.assert_close(*grads, rtol=0.02, atol=0.02 * float(grads[1].abs().max()))

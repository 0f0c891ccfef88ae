"""Chunks of rows: what they are made of, and that nothing of them is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from aurora_kernels.rows import log_softmax
from aurora_rl.objectives.chunks import by_chunks, rows_and_head
from aurora_rl.policies import HeadLogits


def test_rows_and_head_make_the_logits() -> None:
    states, weight = torch.randn(5, 3), torch.randn(7, 3)
    logits = HeadLogits(states, weight)
    rows, head = rows_and_head(logits)
    torch.testing.assert_close(head(rows[1:3]), (states @ weight.T)[1:3])
    assert "product" not in vars(logits)
    heads, head_of = [weight, torch.randn(7, 3), torch.randn(7, 3)], torch.tensor([2, 0, 0, 2, 0])
    rows, head = rows_and_head(logits := HeadLogits(states, heads, head_of))
    torch.testing.assert_close(head(rows[2:5]), (logits + 0)[2:5])
    rows, head = rows_and_head(plain := states @ weight.T)
    assert rows is plain and head(rows) is plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_heads_gradient_is_summed_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 a sum of ones ends at 256."""
    states, weight = torch.ones(300, 2, dtype=dtype), torch.ones(4, 2, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        rows, head = rows_and_head(HeadLogits(states, weight))
        (total,) = by_chunks(lambda part: (head(part).float().sum(-1),), [(part,) for part in rows.split(1)])
        assert head(rows).dtype == torch.bfloat16
    total.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == dtype and bool((weight.grad == 300).all())


def test_values_and_gradients_are_those_of_one_call() -> None:
    states, weight = torch.randn(9, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)

    def entropy_and_best(rows: Tensor) -> tuple[Tensor, Tensor]:
        log_q = log_softmax(rows @ weight.T)
        return -(log_q.exp() * log_q).sum(-1), log_q.argmax(-1)

    found, best = by_chunks(entropy_and_best, [(part,) for part in states.split(4)])
    expected, expected_best = entropy_and_best(states)
    torch.testing.assert_close(found, expected)
    assert torch.equal(best, expected_best)
    direction = torch.randn(9)
    gradients = (torch.autograd.grad(each, (states, weight), direction) for each in (found, expected))
    torch.testing.assert_close(*gradients)


def test_nothing_but_rows_is_kept_and_a_call_is_repeated_up_to_its_last_gradient() -> None:
    x, calls = torch.randn(6, requires_grad=True), []

    def called(part: Tensor) -> tuple[Tensor, Tensor]:
        calls.append("learns")
        square = part.exp()
        calls.append("constant")
        return square, part.detach() > 0

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        value, _ = by_chunks(called, [(part,) for part in x.split(2)])
    assert calls == ["learns", "constant"] * 3
    assert {t.untyped_storage().data_ptr() for t in kept} <= {x.untyped_storage().data_ptr()}  # the rows themselves
    value.sum().backward()
    assert calls[6:] == ["learns"] * 3

"""The two-head loss against a naive one in float64: values, gradients, and the memory that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensor_sizes import largest_tensor
from torch import Tensor

from aurora_kernels import ClosedForm, HeadTarget, LogProbTarget, TopKTarget, closed_form, two_head_loss

V, H, HT = 41, 6, 9  # no block or chunk divides the vocabulary
VOCAB = torch.tensor([0, 3, 4, 7, 11, 19, 20, 25, 33, 38, 40])


def squared_error(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() - log_q.exp()).square().sum(-1)


def closed(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p.clamp(min=-1e4) - log_q)).sum(-1)


# What two_head_loss is given, and the function that it is.
DIVERGENCES: list[tuple[Callable[..., Tensor] | ClosedForm, Callable[..., Tensor]]] = [
    (squared_error, squared_error),
    (closed_form("forward_kl"), closed),
]


class World:
    """States and heads of a drafter and its target; `depths` None is a single tensor of states."""

    def __init__(self, rows: int = 13, depths: int | None = None, heads: int = 1, dtype: torch.dtype = torch.float64):
        generator = torch.Generator().manual_seed(rows)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        self.states = [normal(rows, H).requires_grad_() for _ in range(depths or 1)]
        own = [normal(len(VOCAB), H).requires_grad_() for _ in range(heads)]
        self.heads = own if heads > 1 else own * len(self.states)
        self.target = HeadTarget(normal(rows, HT), normal(V, HT))
        self.single = depths is None

    def loss(self, divergence: Any, **settings: Any) -> tuple[Tensor, Tensor]:
        states, heads = (self.states[0], self.heads[0]) if self.single else (self.states, self.heads)
        return two_head_loss(states, heads, self.target, divergence, draft_vocab=VOCAB, **settings)

    def naive(self, divergence: Any, renormalize: bool = True, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        p = (self.target.hidden @ self.target.weight.T / temperature).softmax(-1)[:, VOCAB]
        p = p / p.sum(-1, keepdim=True) if renormalize else p
        logits = [x @ head.T / temperature for x, head in zip(self.states, self.heads, strict=True)]
        values = torch.stack([divergence(p.log(), each.log_softmax(-1)) for each in logits])
        agreement = torch.stack([each.argmax(-1) == p.argmax(-1) for each in logits])
        return (values[0], agreement[0]) if self.single else (values, agreement)

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [*self.states, *dict.fromkeys(self.heads)]))


def check(world: World, divergence: Any, plain: Any, upstream: Tensor, **settings: Any) -> None:
    """Values, agreement and gradients of a chunked and a naive loss."""
    values, agreement = world.loss(divergence, **settings)
    for key in ("row_weights", "rows_per_chunk"):
        settings.pop(key, None)
    expected, agrees = world.naive(plain, **settings)
    torch.testing.assert_close(values, expected)
    assert torch.equal(agreement, agrees) and not agreement.requires_grad
    for got, wanted in zip(
        world.gradients((values * upstream).sum()), world.gradients((expected * upstream).sum()), strict=True
    ):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("divergence", "plain"), DIVERGENCES, ids=["any", "closed form"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("rows_per_chunk", [1, 5, None])
@pytest.mark.parametrize(("rows", "depths", "heads"), [(1, None, 1), (13, None, 1), (13, 3, 1), (13, 3, 3)])
def test_it_is_the_naive_loss(
    rows: int,
    depths: int | None,
    heads: int,
    rows_per_chunk: int | None,
    renormalize: bool,
    temperature: float,
    divergence: Any,
    plain: Any,
) -> None:
    world = World(rows, depths, heads)
    settings = dict(renormalize=renormalize, temperature=temperature, rows_per_chunk=rows_per_chunk)
    check(world, divergence, plain, torch.tensor(0.25), **settings)


UPSTREAMS = {
    "a multiple": lambda weights: -3.0 * weights,
    "something else": lambda weights: torch.linspace(-1, 2, weights.numel(), dtype=weights.dtype).view_as(weights),
    "nothing": torch.zeros_like,
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("upstream", UPSTREAMS)
@pytest.mark.parametrize("depths", [None, 3])
def test_the_gradient_is_exact_whatever_was_expected(depths: int | None, upstream: str, weighted: bool) -> None:
    world = World(13, depths)
    shape = (13,) if depths is None else (3, 13)
    weights = torch.rand(shape, dtype=torch.float64) + 0.1 if weighted else torch.ones(shape, dtype=torch.float64)
    settings = {"row_weights": weights} if weighted else {}
    divergence, plain = DIVERGENCES[1]
    check(world, divergence, plain, UPSTREAMS[upstream](weights), rows_per_chunk=4, **settings)


def test_what_was_expected_is_not_computed_again() -> None:
    calls = 0

    def counted(log_p: Tensor, log_q: Tensor) -> Tensor:
        nonlocal calls
        calls += len(log_q)
        return squared_error(log_p, log_q)

    world = World(13)
    weights = torch.rand(13, dtype=torch.float64) + 0.1
    values, _ = world.loss(counted, row_weights=weights)
    world.gradients((values * weights / 7).sum())
    assert calls == 13
    values, _ = world.loss(counted, row_weights=weights)
    world.gradients(values.sum())
    assert calls == 39


def test_backward_may_run_twice() -> None:
    world = World(13)
    values, _ = world.loss(squared_error)
    parameters = [world.states[0], world.heads[0]]
    first, second = (torch.autograd.grad(2 * values.sum(), parameters, retain_graph=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("divergence", [squared_error, closed_form("total_variation")], ids=["any", "closed form"])
def test_gradcheck(divergence: Any) -> None:
    world = World(5)

    def loss(states: Tensor, head: Tensor) -> Tensor:
        return two_head_loss(states, head, world.target, divergence, draft_vocab=VOCAB, rows_per_chunk=2)[0]

    assert torch.autograd.gradcheck(loss, (world.states[0], world.heads[0]))


@pytest.mark.parametrize("junk", [math.nan, math.inf])
@pytest.mark.parametrize("depths", [None, 3])
def test_rows_of_weight_0_may_hold_anything(depths: int | None, junk: float) -> None:
    world, divergence = World(13, depths), closed_form("forward_kl")
    weights = torch.ones((13,) if depths is None else (3, 13), dtype=torch.float64)
    weights[..., 2] = 0.0
    weights[(-1, 7) if depths else 7] = 0.0  # at one depth of several
    values, agreement = world.loss(divergence, row_weights=weights, rows_per_chunk=4)
    expected, _ = world.naive(closed)
    torch.testing.assert_close(values, torch.where(weights == 0, 0.0, expected))
    assert not agreement[weights == 0].any()
    wanted = world.gradients((expected * weights).sum())
    with torch.no_grad():
        for step, x in enumerate(world.states):
            x[(weights if depths is None else weights[step]) == 0] = junk
        world.target.hidden[2] = junk
    values, _ = world.loss(divergence, row_weights=weights, rows_per_chunk=4)
    for upstream in (weights, weights + 1):  # the second is not the gradient that was expected
        got = world.gradients((values * upstream).sum())
        scale = 1.0 if upstream is weights else 2.0
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, scale * b)
        values, _ = world.loss(divergence, row_weights=weights, rows_per_chunk=4)


def test_a_row_that_is_discarded_afterwards_spoils_nothing() -> None:
    """Without weights the row is computed. Its value is not a number, and its upstream gradient is zero."""
    world, divergence = World(13), closed_form("forward_kl")
    kept = torch.arange(13) != 4
    wanted = world.gradients(world.naive(closed)[0][kept].sum())
    with torch.no_grad():
        world.states[0][4] = math.nan
    values, _ = world.loss(divergence)
    assert values.isnan().tolist() == (~kept).tolist()
    for a, b in zip(world.gradients(torch.where(kept, values, 0.0).sum()), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_a_target_that_excludes_tokens() -> None:
    world, plain = World(13), closed
    log_p = (world.target.hidden @ world.target.weight.T).log_softmax(-1)[:, VOCAB]
    log_p = log_p.masked_fill(log_p < log_p.topk(3, dim=-1).values[:, -1:], -math.inf)
    values, _ = two_head_loss(world.states[0], world.heads[0], LogProbTarget(log_p), closed_form("forward_kl"))
    log_p = log_p.log_softmax(-1)
    expected = plain(log_p, (world.states[0] @ world.heads[0].T).log_softmax(-1))
    torch.testing.assert_close(values, expected)
    for a, b in zip(world.gradients(values.sum()), world.gradients(expected.sum()), strict=True):
        torch.testing.assert_close(a, b)


def test_the_likeliest_tokens_of_a_target() -> None:
    world = World(13)
    log_p = (world.target.hidden @ world.target.weight.T).log_softmax(-1)
    top = log_p.topk(V, dim=-1)
    target = TopKTarget(top.indices, top.values, torch.full((13,), -math.inf), V)
    for renormalize in (True, False):
        values, agreement = two_head_loss(
            world.states[0], world.heads[0], target, squared_error, draft_vocab=VOCAB, renormalize=renormalize
        )
        expected, agrees = world.naive(squared_error, renormalize)
        torch.testing.assert_close(values, expected)
        assert torch.equal(agreement, agrees)


@pytest.mark.parametrize("depths", [None, 2])
def test_no_rows(depths: int | None) -> None:
    world = World(0, depths)
    values, agreement = world.loss(closed_form("forward_kl"))
    assert values.shape == agreement.shape == ((0,) if depths is None else (2, 0))
    assert not any(g.any() for g in world.gradients(values.sum()))
    world = World(3, depths)
    values, _ = world.loss(closed_form("forward_kl"), row_weights=torch.zeros(3, dtype=torch.float64))
    assert not values.any() and not any(g.any() for g in world.gradients(values.sum()))


def test_only_what_learns_gets_a_gradient() -> None:
    world = World(13)
    world.heads[0].requires_grad_(False)
    values, _ = world.loss(squared_error)
    (got,) = torch.autograd.grad(values.sum(), world.states[0])
    world.heads[0].requires_grad_(True)
    torch.testing.assert_close(got, world.gradients(world.naive(squared_error)[0].sum())[0])
    with torch.no_grad():
        assert not world.loss(squared_error)[0].requires_grad


def test_a_constant_divergence_teaches_nothing() -> None:
    world = World(13)
    values, _ = world.loss(lambda log_p, log_q: log_p.exp().sum(-1))
    assert not any(g.any() for g in world.gradients(values.sum()))


@pytest.mark.parametrize("name", ["forward_kl", "jensen_shannon"])
def test_float32_and_autocast_are_near_float64(name: str) -> None:
    exact, single = World(64), World(64, dtype=torch.float32)
    wanted_values = exact.loss(closed_form(name))[0]
    wanted = exact.gradients(wanted_values.mean())
    values, _ = single.loss(closed_form(name))
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), wanted_values, rtol=1e-4, atol=1e-5)
    for a, b in zip(single.gradients(values.mean()), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = single.loss(closed_form(name), rows_per_chunk=10)
    assert values.dtype == torch.float32
    assert not torch.allclose(values.double(), wanted_values, rtol=1e-4)  # the products are in bfloat16
    for a, b in zip(single.gradients(values.mean()), wanted, strict=True):
        assert a.dtype == torch.float32
        assert float((a.double() - b).norm() / b.norm()) < 0.02


@pytest.mark.parametrize("divergence", [squared_error, closed_form("jensen_shannon")], ids=["any", "closed form"])
@pytest.mark.parametrize("renormalize", [True, False])
def test_no_tensor_is_as_large_as_rows_times_vocabulary(renormalize: bool, divergence: Any) -> None:
    rows, vocab, width = 512, 1000, 8
    states, head = torch.randn(rows, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    target = HeadTarget(torch.randn(rows, width), torch.randn(2 * vocab, width))

    def learn(**settings: Any) -> None:
        values, _ = two_head_loss(
            states, head, target, divergence, draft_vocab=torch.arange(vocab), renormalize=renormalize, **settings
        )
        (values * torch.linspace(0, 1, rows)).sum().backward()  # of the head the chunks are walked again

    assert largest_tensor(lambda: learn(rows_per_chunk=rows)) >= rows * vocab
    assert largest_tensor(lambda: learn(rows_per_chunk=32)) <= 32 * vocab * (1 if renormalize else 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(3, 5)}, r"states must be \[n, H\] and weight \[Vd, H\], got \[3, 5\] and \[11, 6\]"),
        ({"states": torch.zeros(4, 6)}, r"states and target must have as many rows, got \[4\] and 3"),
        ({"states": []}, "states and weights must be as many, and at least one, got 0 and 0"),
        ({"weight": torch.zeros(9, 6)}, r"draft_vocab has 11 rows, and the weights have \[9\]"),
        ({"draft_vocab": VOCAB - 1}, rf"draft_vocab must lie in 0..{V - 1}, got -1"),
        ({"draft_vocab": VOCAB + V}, rf"draft_vocab must lie in 0..{V - 1}, got {int(VOCAB.max()) + V}"),
        ({"draft_vocab": VOCAB.clone().index_fill_(0, torch.tensor([3, 7]), 5)}, "each token once, got 5 [23] times"),
        ({"draft_vocab": None}, rf"the target has {V} columns and the drafter's head 11; name those that it has"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"row_weights": torch.ones(4)}, r"row_weights must be \[n\] or \[J, n\] = \[1, 3\], got \[4\]"),
        ({"rows_per_chunk": 0}, "rows_per_chunk must be at least 1, got 0"),
        ({"divergence": lambda p, q: q.sum()}, r"must return \[r\] of \[r, Vd\] = \[3, 11\], got \[\]"),
    ],
)
def test_bad_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    arguments = {
        "states": torch.zeros(3, H),
        "weight": torch.zeros(len(VOCAB), H),
        "target": HeadTarget(torch.zeros(3, HT), torch.zeros(V, HT)),
        "divergence": squared_error,
        "draft_vocab": VOCAB,
    }
    with pytest.raises(ValueError, match=message):
        two_head_loss(**{**arguments, **change})


def test_second_derivatives_are_refused_and_not_left_out() -> None:
    states, head = (torch.randn(n, H, requires_grad=True) for n in (3, V))
    target = HeadTarget(torch.randn(3, HT), torch.randn(V, HT))
    values, _ = two_head_loss(states, head, target, squared_error)
    with pytest.raises(RuntimeError, match="two_head_loss has first derivatives only; leave create_graph=True out"):
        torch.autograd.grad(values.sum() + states.pow(3).sum(), states, create_graph=True)


@pytest.mark.parametrize("rows", [torch.tensor([True, False, True, True, True]), torch.ones(5, dtype=torch.bool)])
def test_rows_whose_weights_come_later_have_exact_gradients_and_one_product_for_the_head(rows: Tensor) -> None:
    states, head = (torch.randn(size, 4, dtype=torch.float64, requires_grad=True) for size in (5, 7))
    target = LogProbTarget(torch.randn(5, 7, dtype=torch.float64).log_softmax(-1))
    found = []
    for weights in (rows, rows.double()):
        values, _ = two_head_loss(states, head, target, closed_form("total_variation"), row_weights=weights)
        found.append([values, *torch.autograd.grad(values.square().sum(), (states, head))])
    torch.testing.assert_close(found[0], found[1])
    values, _ = two_head_loss(states, head, target, closed_form("total_variation"), row_weights=rows)
    node = values.grad_fn.next_functions[0][0]  # type: ignore[union-attr]
    assert node.heads is None and node.states[0] is not None  # type: ignore[union-attr]


def test_agreement_with_rows_of_ones_choice() -> None:
    states, head = torch.eye(3), torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [0.0, 2.0, 1.0]])
    target, choices = LogProbTarget(torch.zeros(3, 3)), torch.tensor([1, 0, -1])
    _, agreement = two_head_loss(states, head, target, closed_form("forward_kl"), choices=choices)
    assert agreement.tolist() == [True, False, False]
    with pytest.raises(ValueError, match=r"choices must be \[n\] = \[3\], got \[2\]"):
        two_head_loss(states, head, target, closed_form("forward_kl"), choices=choices[:2])

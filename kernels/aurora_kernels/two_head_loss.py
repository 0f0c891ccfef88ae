"""The two-head drafter loss: a drafter's distribution against its target's, through both heads, by chunks of rows.

Legend: ``n`` rows, ``r`` of a chunk, ``J`` depths, ``H`` hidden size, ``V`` vocabulary, ``Vd`` draft vocabulary.

Logits ``[n, Vd]`` of drafter and target, and what a divergence makes of them, take far more memory than anything else
in a drafter's training. Here they exist for a chunk of rows only. A chunk's gradient in the logits is multiplied out at
once, in the forward pass, so that nothing is computed twice:

- The gradient in the states belongs to single rows. It is kept for an upstream gradient of 1 and scaled by row.
- The gradient in a head sums over rows, so the upstream gradient must be known. ``row_weights`` says what it will be,
  up to a factor. If backward brings anything else, the chunks are walked again. If they only say which rows count, a
  head's gradient is left to backward.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aurora_kernels.closed_forms import ClosedForm
from aurora_kernels.noise import argmax
from aurora_kernels.rows import Rows, agreeing, blocks, chunk_rows, log_softmax, product_dtype, row_dtype
from aurora_kernels.targets import Reader, Target

Divergence = Callable[[Tensor, Tensor], Tensor]


def two_head_loss(
    states: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    target: Target,
    divergence: Divergence | ClosedForm,
    *,
    draft_vocab: Tensor | None = None,
    renormalize: bool = True,
    temperature: float = 1.0,
    row_weights: Tensor | None = None,
    choices: Tensor | None = None,
    rows_per_chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute a divergence between target and drafter at every row, without logits of all rows.

    Gradients reach states and weights, not the target, and are first derivatives: a graph of them cannot be made.
    Matrix products are in the weights' dtype, or in autocast's; the rest is in float32, or in float64 of float64
    weights.

    Args:
        states: Inputs of the drafter's head, ``[n, H]``, or a sequence of ``J`` such tensors, each compared with the
            same rows of the target, as depths of a drafter are.
        weight: The drafter's head, ``[Vd, H]``, or one for each of the ``J``.
        target: The target's distribution at the rows: :class:`HeadTarget`, :class:`LogProbTarget`, :class:`TopKTarget`
            or another :class:`Target`.
        divergence: Function of ``log_p`` (target) and ``log_q`` (drafter), ``[r, Vd]`` each, that returns ``[r]``, row
            by row and differentiable in ``log_q``; or a :class:`ClosedForm`, which is faster.
        draft_vocab: The target's tokens that the drafter's rows stand for, ``[Vd]`` int64, each once; None for all.
        renormalize: Whether the target's distribution is renormalised over the draft vocabulary. Otherwise it keeps
            its share of the whole vocabulary.
        temperature: Temperature of both distributions.
        row_weights: Gradient that the values will receive, ``[n]`` or ``[J, n]``, up to a common factor; None for that
            of a sum or mean. With any other gradient backward is as exact, and takes as long as forward once more if
            a head learns. Rows of weight 0 are left out: their value is 0, whatever they hold. If the gradient is not
            known before the values are, bool says which rows count, and no head's gradient is computed in vain.
        choices: Rows of the draft vocabulary to look for among the drafter's likeliest, ``[n]`` int64, −1 for none;
            None for the target's likeliest.
        rows_per_chunk: Rows of a chunk; None chooses by device and vocabulary.

    Returns:
        Values ``[n]``, or ``[J, n]`` of a sequence; and bool of the same shape, whether the target's likeliest token
        of the draft vocabulary, or that of ``choices``, is the drafter's likeliest.

    Raises:
        ValueError: Shapes do not fit, ``draft_vocab`` has a token twice or one that the target does not have,
            ``temperature`` is not positive, ``rows_per_chunk`` is below 1, or the divergence does not return ``[r]``.
        RuntimeError: In backward with ``create_graph=True``.

    Example:
        >>> from aurora_kernels import HeadTarget, closed_form, two_head_loss
        >>> states, head = torch.randn(5, 8, requires_grad=True), torch.randn(32, 8, requires_grad=True)
        >>> target = HeadTarget(torch.randn(5, 16), torch.randn(32, 16))
        >>> values, agreement = two_head_loss(states, head, target, closed_form("forward_kl"))
        >>> values.mean().backward()
        >>> values.shape, states.grad.shape, head.grad.shape
        (torch.Size([5]), torch.Size([5, 8]), torch.Size([32, 8]))
    """
    steps = [states] if isinstance(states, Tensor) else list(states)
    weights = [weight] * len(steps) if isinstance(weight, Tensor) else list(weight)
    _check(steps, weights, target, draft_vocab, temperature, row_weights, choices, rows_per_chunk)
    count, device = len(steps[0]), steps[0].device
    hint = torch.ones((), device=device) if row_weights is None else row_weights.detach()
    hint = hint.to(row_dtype(weights[0].dtype)).expand(len(steps), count)
    heads = list({id(each): each for each in weights}.values())  # a head that depths share has one gradient
    head_of = [next(i for i, head in enumerate(heads) if head is each) for each in weights]
    with torch.no_grad():
        read = target.reader(draft_vocab, renormalize=renormalize, temperature=temperature)
    plan = _Plan(
        read,
        divergence,
        temperature,
        dtype=product_dtype(weights[0]),
        head_of=tuple(head_of),
        size=rows_per_chunk or chunk_rows(device, len(weights[0]), count),
        sparse=row_weights is not None,
        foreseen=row_weights is None or row_weights.dtype != torch.bool,
        choices=choices,
    )
    values, agreement = _TwoHeadLoss.apply(plan, torch.is_grad_enabled(), hint, *steps, *heads)
    return (values[0], agreement[0]) if isinstance(states, Tensor) else (values, agreement)


_PART = 4096  # rows of a head whose gradients of a chunk are summed at once, where their dtypes differ


@dataclass(frozen=True)
class _Plan:
    """Inputs of a walk over the chunks, apart from tensors that may learn.

    Attributes:
        read: Reads the target's log-probabilities.
        divergence: See :func:`two_head_loss`.
        temperature: See :func:`two_head_loss`.
        dtype: Dtype of matrix products.
        head_of: Head of each of the ``J`` steps.
        size: Rows of a chunk.
        sparse: Whether some rows may have weight 0.
        foreseen: Whether the rows' weights are those of the upstream gradient, up to a factor.
        choices: See :func:`two_head_loss`.
    """

    read: Reader
    divergence: Divergence | ClosedForm
    temperature: float
    dtype: torch.dtype
    head_of: tuple[int, ...]
    size: int
    sparse: bool
    foreseen: bool
    choices: Tensor | None

    def chunks(self, weights: Tensor) -> list[Rows]:
        """Return the rows of each chunk, without those that have no weight at any step."""
        count = weights.shape[1]
        if self.sparse:
            rows = (weights != 0).any(0).nonzero()[:, 0]
            if len(rows) < count:
                return list(rows.split(self.size)) if len(rows) else []
        return [slice(start, start + self.size) for start in range(0, count, self.size)]


class _Walked(NamedTuple):
    """Results of a walk over the chunks; see :func:`_walk`."""

    values: Tensor
    agreement: Tensor
    states: list[Tensor | None]
    heads: list[Tensor | None]


class _TwoHeadLoss(torch.autograd.Function):
    """Values and agreement ``[J, n]`` of ``J`` states and their heads; see the module for its gradients."""

    @staticmethod
    def forward(ctx: Any, plan: _Plan, grad: bool, hint: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        steps = len(plan.head_of)
        learns = [grad and needed for needed in ctx.needs_input_grad[3:]]
        now = learns if plan.foreseen else learns[:steps] + [False] * (len(learns) - steps)
        walked = _walk(plan, tensors[:steps], tensors[steps:], hint, now)
        ctx.save_for_backward(hint, *tensors)
        ctx.plan, ctx.learns, ctx.states = plan, learns, walked.states
        ctx.heads = walked.heads if plan.foreseen else None
        ctx.mark_non_differentiable(walked.agreement)
        return walked.values, walked.agreement

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # `once_differentiable` would raise only where the upstream gradient has a graph
            raise RuntimeError("two_head_loss has first derivatives only; leave create_graph=True out")
        hint, *tensors = ctx.saved_tensors
        upstream = upstream.masked_fill(hint == 0, 0.0)
        states = [
            # Not zero times a row's gradient, which may be infinite where the caller discards the value.
            None if kept is None else torch.where(row[:, None] == 0, 0.0, kept * row[:, None]).to(x.dtype)
            for kept, row, x in zip(ctx.states, upstream, tensors, strict=False)
        ]
        return (None, None, None, *states, *_head_gradients(ctx, hint, upstream, tensors))


def _head_gradients(ctx: Any, hint: Tensor, upstream: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """Return the heads' gradients: those of the forward walk times a factor, or else of another walk."""
    steps = len(ctx.plan.head_of)
    heads = tensors[steps:]
    if not any(ctx.learns[steps:]):
        return [None] * len(heads)
    if not bool(upstream.any()):
        return [torch.zeros_like(head) for head in heads]
    # Scaled in place, since they are large: a second backward pass walks again.
    kept, ctx.heads = ctx.heads, None
    factor = None if kept is None else _factor(upstream, hint)
    if factor is None:
        plan, learns = replace(ctx.plan, sparse=True), [False] * steps + ctx.learns[steps:]
        kept, factor = _walk(plan, tensors[:steps], heads, upstream, learns).heads, 1.0
    return [
        None if gradient is None else (gradient if factor == 1.0 else gradient.mul_(factor)).to(head.dtype)
        for gradient, head in zip(kept, heads, strict=True)
    ]


def _factor(upstream: Tensor, hint: Tensor) -> float | None:
    """Return ``c`` if ``upstream`` is ``c * hint`` up to rounding."""
    largest = hint.abs().argmax()
    factor = float(upstream.flatten()[largest] / hint.flatten()[largest])
    close = torch.isclose(upstream, factor * hint, rtol=32 * torch.finfo(hint.dtype).eps, atol=0.0)
    return factor if bool(close.all()) else None


def _walk(
    plan: _Plan, states: Sequence[Tensor], heads: Sequence[Tensor], weights: Tensor, learns: Sequence[bool]
) -> _Walked:
    """Walk over the chunks.

    Args:
        plan: What to compute.
        states: ``J`` tensors ``[n, H]``.
        heads: Distinct heads, ``[Vd, H]`` each.
        weights: Weight of every row in the heads' gradients, ``[J, n]``.
        learns: Whether each of the states, then each of the heads, needs a gradient.

    Returns:
        Values and agreement ``[J, n]``; the gradient of each row's value in its states, in the product's dtype; and the
        gradient of the weighted sum of values in each head, in float32 at least.
    """
    dtype, device = plan.dtype, weights.device
    values, agreement = weights.new_zeros(weights.shape), weights.new_zeros(weights.shape, dtype=torch.bool)
    state_learns, head_learns = learns[: len(states)], learns[len(states) :]
    state_gradients = [
        x.new_zeros(x.shape, dtype=dtype) if yes else None for x, yes in zip(states, state_learns, strict=True)
    ]
    head_gradients = [
        head.new_zeros(head.shape, dtype=row_dtype(dtype)) if yes else None
        for head, yes in zip(heads, head_learns, strict=True)
    ]
    with torch.autocast(device.type, enabled=False):
        products = [head.to(dtype) for head in heads]
        for rows in plan.chunks(weights):
            log_p = plan.read(rows)
            if log_p.shape[1] != len(heads[0]):
                raise ValueError(
                    f"the target has {log_p.shape[1]} columns and the drafter's head {len(heads[0])}; name those that "
                    "it has by draft_vocab"
                )
            best = torch.cat([argmax(log_p[part]) for part in blocks(log_p)])
            chosen = best if plan.choices is None else plan.choices[rows]
            for step, index in enumerate(plan.head_of):
                weight, x = weights[step, rows], states[step][rows].to(dtype)
                if plan.sparse:
                    x = x.masked_fill((weight == 0)[:, None], 0.0)  # discarded rows may hold anything
                logits = x @ products[index].T
                gradient = state_learns[step] or head_learns[index]
                value, agrees = _row_values(plan, log_p, best, chosen, logits, gradient=gradient)
                values[step, rows], agreement[step, rows] = value.masked_fill(weight == 0, 0.0), agrees & (weight != 0)
                kept, summed = state_gradients[step], head_gradients[index]
                if kept is not None:
                    kept[rows] = logits @ products[index] / plan.temperature
                if summed is not None:
                    weighted = (x * (weight / plan.temperature)[:, None].to(dtype)).contiguous()
                    if summed.dtype == dtype:
                        summed.addmm_(logits.T, weighted)
                    else:  # part by part: all at once would take twice the head's size for the product and its cast
                        for part, columns in zip(summed.split(_PART), logits.split(_PART, 1), strict=True):
                            part += columns.T @ weighted
            del log_p, logits  # before the next chunk's take as much again
    return _Walked(values, agreement, state_gradients, head_gradients)


def _row_values(
    plan: _Plan, log_p: Tensor, best: Tensor, chosen: Tensor, logits: Tensor, *, gradient: bool
) -> tuple[Tensor, Tensor]:
    """Return values and agreement ``[r]`` of a chunk; overwrite its logits with the values' gradient if wanted.

    The gradient is that in the logits after the temperature. Log-probabilities of the target are ``log_p`` ``[r, Vd]``,
    its likeliest rows ``best`` ``[r]``, and those that agreement asks for ``chosen`` ``[r]``.
    """
    if _has_row_kernel(plan.divergence, logits):
        from aurora_kernels.two_head_loss_triton import row_values  # imports Triton, which takes a second

        assert isinstance(plan.divergence, ClosedForm)
        return row_values(plan.divergence, log_p, best, chosen, logits, temperature=plan.temperature, gradient=gradient)
    values, agreement = [], []
    for rows in blocks(logits):
        part, target = logits[rows], log_p[rows]
        agreement.append(agreeing(part, chosen[rows]))
        scaled = part if plan.temperature == 1.0 else part / plan.temperature
        target = target.to(row_dtype(part.dtype))
        if isinstance(plan.divergence, ClosedForm):
            own = part.dtype == target.dtype  # then what a block makes of its logits takes their place
            log_q = torch.log_softmax(scaled, -1, out=part) if own else log_softmax(scaled)
            value, slope = plan.divergence.function(target, log_q)
        else:
            value, slope = _differentiated(plan.divergence, target, scaled, gradient)
        if gradient and slope is not part:
            part.copy_(slope)
        values.append(value)
    return torch.cat(values), torch.cat(agreement)


def _has_row_kernel(divergence: Divergence | ClosedForm, logits: Tensor) -> bool:
    """Return whether Triton's kernel computes a divergence: a named closed form, on a GPU, not in float64."""
    named = isinstance(divergence, ClosedForm) and divergence.name is not None
    there = logits.is_cuda and importlib.util.find_spec("triton") is not None
    return named and there and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _differentiated(divergence: Divergence, log_p: Tensor, logits: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Return values ``[b]`` of a block and, if wanted, their gradient in its logits, by autograd."""
    with torch.set_grad_enabled(gradient):
        leaf = logits.detach().requires_grad_(gradient)
        value = divergence(log_p, log_softmax(leaf))
    if value.shape != logits.shape[:1]:
        raise ValueError(f"the divergence must return [r] of [r, Vd] = {list(logits.shape)}, got {list(value.shape)}")
    if not value.requires_grad:  # nothing learns, or the divergence is constant in this block
        return value, torch.zeros_like(logits) if gradient else logits
    (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach(), slope


def _check(
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    target: Target,
    draft_vocab: Tensor | None,
    temperature: float,
    row_weights: Tensor | None,
    choices: Tensor | None,
    rows_per_chunk: int | None,
) -> None:
    if not states or len(states) != len(weights):
        raise ValueError(f"states and weights must be as many, and at least one, got {len(states)} and {len(weights)}")
    for x, head in zip(states, weights, strict=True):
        if x.ndim != 2 or head.ndim != 2 or x.shape[1] != head.shape[1]:
            raise ValueError(f"states must be [n, H] and weight [Vd, H], got {list(x.shape)} and {list(head.shape)}")
    if len({len(x) for x in states} | {len(target)}) > 1:
        raise ValueError(f"states and target must have as many rows, got {[len(x) for x in states]} and {len(target)}")
    size = len(weights[0]) if draft_vocab is None else len(draft_vocab)
    if any(len(head) != size for head in weights):
        name = "the first weight" if draft_vocab is None else "draft_vocab"
        raise ValueError(f"{name} has {size} rows, and the weights have {[len(head) for head in weights]}")
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    if row_weights is not None and row_weights.shape not in ((len(states[0]),), (len(states), len(states[0]))):
        raise ValueError(
            f"row_weights must be [n] or [J, n] = {[len(states), len(states[0])]}, got {list(row_weights.shape)}"
        )
    if choices is not None and choices.shape != (len(target),):
        raise ValueError(f"choices must be [n] = [{len(target)}], got {list(choices.shape)}")
    if rows_per_chunk is not None and rows_per_chunk < 1:
        raise ValueError(f"rows_per_chunk must be at least 1, got {rows_per_chunk}")

"""The Triton kernel of the two-head loss: values of a chunk's rows, and their gradient in place of the logits.

PyTorch's operations read and write ``[r, Vd]`` a dozen times. This kernel has one program a row. It reads the row three
times, which a GPU's cache holds, and writes it once. The module needs Triton: :func:`aurora_kernels.two_head_loss` uses
it on a GPU where Triton is installed.
"""

# mypy: disallow-untyped-defs=False
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from aurora_kernels.closed_forms import ClosedForm

# Columns that a program reads at a time.
_BLOCK = 4096
# As in closed_forms: exp of it is 0, and so is 0 times it.
_NEVER = tl.constexpr(-1e4)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_LOWEST = tl.constexpr(-1e30)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


def row_values(
    form: ClosedForm,
    log_p: Tensor,
    best: Tensor,
    chosen: Tensor,
    logits: Tensor,
    *,
    temperature: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Compute a divergence of each row, and overwrite the logits with its gradient.

    With ``TRITON_INTERPRET=1`` in the environment when this module is imported, it runs on a CPU, too.

    Args:
        form: A named closed form.
        log_p: The target's log-probabilities, ``[r, Vd]`` float32; −inf is allowed.
        best: The target's likeliest column of each row, ``[r]`` int64.
        chosen: Column of each row that agreement asks for, ``[r]`` int64; −1 agrees with none.
        logits: The drafter's logits before the temperature, ``[r, Vd]`` float32, bfloat16 or float16.
        temperature: Temperature of the drafter's distribution.
        gradient: Whether to overwrite ``logits`` with the gradient in the logits after the temperature.

    Returns:
        Values, ``[r]`` float32; and whether ``chosen`` has the drafter's largest logit, ``[r]`` bool.
    """
    count, width = logits.shape
    values, agreement = logits.new_empty(count, dtype=torch.float32), logits.new_empty(count, dtype=torch.bool)
    block = min(_BLOCK, triton.next_power_of_2(width))
    if count:
        _rows[(count,)](
            logits, log_p, best, chosen, values, agreement, logits.stride(0), log_p.stride(0), width, 1 / temperature,
            form.setting, form.name, gradient, block, num_warps=8,
        )  # fmt: skip
    return values, agreement


@triton.jit
def _add(highest, total, x):
    """Add ``x`` to a running sum of exponentials, ``total * exp(highest)``."""
    now = tl.maximum(highest, x)
    return now, total * tl.exp(highest - now) + tl.exp(x - now)


@triton.jit
def _log_sum(highest, total):
    most = tl.max(highest, 0)
    return most + tl.log(tl.sum(total * tl.exp(highest - most), 0))


@triton.jit
def _overlap(log_p, log_q):
    """Return log(min(p, q)), and which of it moves with q: all, half where both are equal, or none."""
    least = tl.minimum(log_p, log_q, propagate_nan=_ALL)
    below = tl.where(log_q < log_p, 1.0, tl.where(log_q == log_p, 0.5, 0.0))
    return tl.maximum(least, _NEVER, propagate_nan=_ALL), tl.where(least >= _NEVER, below, 0.0)


@triton.jit
def _terms(log_p, log_q, chosen, setting, log_overlap, FORM: tl.constexpr):
    """Return what a form sums over the columns, at most four terms; see closed_forms for the formulas."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    log_p = tl.maximum(log_p, _NEVER, propagate_nan=_ALL)
    side = tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
    a, b, c, d = tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p), tl.zeros_like(p)
    if FORM == "forward_kl":
        a, b = p * (log_p - log_q), p
    elif FORM == "reverse_kl":
        a = q * (log_q - log_p)
    elif FORM == "jensen_shannon":
        log_m = tl.log(tl.maximum(setting * p + (1 - setting) * q, _TINY, propagate_nan=_ALL))
        a, b = p * (log_p - log_m), q * (log_q - log_m)
    elif FORM == "skewed_kl":
        mixed = tl.maximum(setting * p + (1 - setting) * q, _TINY, propagate_nan=_ALL)
        a, b = p * (log_p - tl.log(mixed)), q * p / mixed
    elif FORM == "total_variation":
        a, b = tl.minimum(p, q, propagate_nan=_ALL), q * side
    elif FORM == "negative_log_overlap":
        least, below = _overlap(log_p, log_q)
        b = tl.exp(least - log_overlap) * below
    elif FORM == "hybrid_overlap":
        a, b, c, d = tl.minimum(p, q, propagate_nan=_ALL), q * side, p * (log_p - log_q), p
    elif FORM == "cross_entropy":
        a, b = tl.where(chosen, -log_q, 0.0), tl.where(p != p, p, 0.0)
    elif FORM == "missed_probability":
        a = p * q
    return a, b, c, d


@triton.jit
def _value(a, b, c, setting, log_overlap, FORM: tl.constexpr):
    value = a
    if FORM == "jensen_shannon":
        value = setting * a + (1 - setting) * b
    elif FORM == "total_variation" or FORM == "missed_probability":
        value = 1 - a
    elif FORM == "negative_log_overlap":
        value = -log_overlap
    elif FORM == "hybrid_overlap":
        weight = tl.exp(-setting * a)
        value = weight * c + (1 - weight) * (1 - a)
    elif FORM == "cross_entropy":
        value = a + b
    return value


@triton.jit
def _slope(log_p, log_q, chosen, a, b, d, setting, log_overlap, FORM: tl.constexpr):
    """Return the gradient in the logits, by the sums of the row."""
    p, q = tl.exp(log_p), tl.exp(log_q)
    log_p = tl.maximum(log_p, _NEVER, propagate_nan=_ALL)
    side = tl.where(p > q, 0.5, tl.where(p < q, -0.5, 0.0))
    slope = q
    if FORM == "forward_kl":
        slope = q * b - p
    elif FORM == "reverse_kl":
        slope = q * (log_q - log_p - a)
    elif FORM == "jensen_shannon":
        log_m = tl.log(tl.maximum(setting * p + (1 - setting) * q, _TINY, propagate_nan=_ALL))
        slope = (1 - setting) * q * (log_q - log_m - b)
    elif FORM == "skewed_kl":
        mixed = tl.maximum(setting * p + (1 - setting) * q, _TINY, propagate_nan=_ALL)
        slope = (1 - setting) * q * (b - p / mixed)
    elif FORM == "total_variation":
        slope = q * (b - side)
    elif FORM == "negative_log_overlap":
        least, below = _overlap(log_p, log_q)
        slope = q * b - tl.exp(least - log_overlap) * below
    elif FORM == "hybrid_overlap":
        weight = tl.exp(-setting * a)
        slope = (1 - weight) * q * (b - side) + weight * (q * d - p)
    elif FORM == "cross_entropy":
        slope = q - tl.where(chosen, 1.0, 0.0)
    elif FORM == "missed_probability":
        slope = q * (a - p)
    return slope


@triton.jit
def _rows(
    logits, log_p, best, chosen, values, agreement, logits_stride, log_p_stride, width,
    inverse_temperature, setting, FORM: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    log_p += row * log_p_stride
    choice = tl.load(best + row)
    columns = tl.arange(0, BLOCK)
    highest, total = tl.full([BLOCK], _LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32) * inverse_temperature
        highest, total = _add(highest, total, x)
    log_sum = _log_sum(highest, total)
    asked = tl.load(chosen + row)
    chosen_logit = tl.load(logits + asked, mask=asked >= 0, other=-float("inf")).to(tl.float32) * inverse_temperature
    tl.store(agreement + row, (chosen_logit >= tl.max(highest, 0)) & (asked >= 0))

    log_overlap = 0.0
    if FORM == "negative_log_overlap":
        highest, total = tl.full([BLOCK], _LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            at = start + columns
            x = tl.load(logits + at, mask=at < width, other=-float("inf")).to(tl.float32) * inverse_temperature
            least, _ = _overlap(tl.load(log_p + at, mask=at < width, other=0.0).to(tl.float32), x - log_sum)
            highest, total = _add(highest, total, tl.where(at < width, least, -float("inf")))
        log_overlap = _log_sum(highest, total)

    a, b = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    c, d = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + columns
        log_q = tl.load(logits + at, mask=at < width, other=0.0).to(tl.float32) * inverse_temperature - log_sum
        target = tl.load(log_p + at, mask=at < width, other=0.0).to(tl.float32)
        more_a, more_b, more_c, more_d = _terms(target, log_q, at == choice, setting, log_overlap, FORM)
        a += tl.where(at < width, more_a, 0.0)
        b += tl.where(at < width, more_b, 0.0)
        c += tl.where(at < width, more_c, 0.0)
        d += tl.where(at < width, more_d, 0.0)
    sum_a, sum_b, sum_c, sum_d = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
    tl.store(values + row, _value(sum_a, sum_b, sum_c, setting, log_overlap, FORM))
    if GRADIENT:
        for start in range(0, width, BLOCK):
            at = start + columns
            log_q = tl.load(logits + at, mask=at < width, other=0.0).to(tl.float32) * inverse_temperature - log_sum
            target = tl.load(log_p + at, mask=at < width, other=0.0).to(tl.float32)
            slope = _slope(target, log_q, at == choice, sum_a, sum_b, sum_d, setting, log_overlap, FORM)
            tl.store(logits + at, slope.to(logits.dtype.element_ty), mask=at < width)

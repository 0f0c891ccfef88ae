"""The probe of a function that is to be an objective: does it hold by chunks of windows, and when it is called again?

Legend: ``J`` unroll steps, ``C`` windows, ``Vd`` draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from aurora_rl.objectives.windows import Windows

Call = Callable[[Tensor, Tensor, Windows], tuple[Tensor, Tensor]]
"""``call(log_p, log_q, windows) -> (values, mask)``, whose shapes are checked."""

_WINDOWS, _VOCAB = 5, 256
# Seeds over which means are taken, and the standard errors by which two means may differ.
_SEEDS, _ERRORS = 128, 6.0


class _Found(NamedTuple):
    """Result of a call: values where they count, their mask, and the gradient of a weighted sum of them."""

    values: Tensor
    mask: Tensor
    gradient: Tensor

    def window(self, place: int) -> tuple[Tensor, ...]:
        return tuple(each[:, place].double() for each in self)


def probe_function(call: Call, steps: int) -> None:
    """Call a function on a text of five tokens, and raise ValueError unless it may be called on some at a time.

    Args:
        call: The function, with its settings.
        steps: Depths ``J`` of the windows.

    Raises:
        ValueError: It changes its arguments, its values have no gradient in ``log_q``, or two calls with the same
            random state differ. Or a window has other values, mask or gradient next to others.

    Example:
        >>> probe_function(lambda log_p, log_q, windows: (-(log_p.exp() * log_q).sum(-1), windows.valid), steps=3)
    """
    inputs = _inputs(steps)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        together, draws = _called(call, inputs, range(_WINDOWS))
        again, _ = _called(call, inputs, range(_WINDOWS))
        for found, expected in zip(again, together, strict=True):
            if not _same(found, expected):
                raise ValueError(
                    "its function must return the same when it is called again with the same random state, as the "
                    f"backward pass does, and returns {expected.flatten()[:6].tolist()} and then "
                    f"{found.flatten()[:6].tolist()}; draw random numbers from PyTorch's default generator, and keep "
                    "no state"
                )
        for place in range(_WINDOWS):
            # Fewer windows draw other numbers, so a random function is called on as many, all of them copies of one.
            alone, _ = _called(call, inputs, [place] * (_WINDOWS if draws else 1))
            both = zip(_Found._fields, alone.window(place if draws else 0), together.window(place), strict=True)
            for name, found, expected in both:
                if not _same(found, expected):
                    raise _depends(name, found, expected, "next to copies of it" if draws else "by itself")
        if draws:
            _check_law(call, inputs)


def _inputs(steps: int) -> tuple[Tensor, Tensor, Windows]:
    """Return windows of two requests: one text's token has no row, and the last window is cut after its first draft."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = torch.randn(2, steps, _WINDOWS, _VOCAB, generator=generator).log_softmax(-1)
    rows = torch.randint(_VOCAB, (steps, _WINDOWS), generator=generator)
    rows[0, 1] = -1
    valid = torch.ones(steps, _WINDOWS, dtype=torch.bool)
    valid[1:, -1] = False
    return log_p, log_q, Windows(rows, torch.tensor([0, 0, 0, 1, 1]), valid)


def _called(
    call: Call, inputs: tuple[Tensor, Tensor, Windows], places: Sequence[int], seed: int = 0
) -> tuple[_Found, bool]:
    """Return what a call on the windows at some places returns, and whether it draws random numbers."""
    part = list(places)
    log_p, leaf = (each[:, part] for each in inputs[:2])
    leaf.requires_grad_()
    log_q, windows = leaf.clone(), Windows(*(each[..., part] for each in inputs[2]))
    arguments = {"log_p": log_p, "log_q": log_q}
    arguments |= {f"windows.{name}": each for name, each in windows._asdict().items()}
    kept = {name: each.detach().clone() for name, each in arguments.items()}
    torch.default_generator.manual_seed(seed)
    before = torch.get_rng_state()
    values, mask = call(log_p, log_q, windows)
    draws = not torch.equal(before, torch.get_rng_state())
    if changed := [name for name, each in arguments.items() if not torch.equal(each, kept[name])]:
        raise ValueError(
            f"its function must leave its arguments as they are, and changes {changed[0]} in place; the backward pass "
            "would see the change. Write x.clamp(...) in place of x.clamp_(...), or change a clone"
        )
    if not values.requires_grad:
        raise ValueError(
            "its function's values have no gradient in log_q, so that nothing would learn; compute them from log_q, "
            "and not under torch.no_grad() or from log_q.detach()"
        )
    mask = mask & windows.valid
    counted = torch.where(mask, values, 0.0)
    # Upstream gradients that differ: those of a mean over all windows would cancel otherwise.
    upstream = (torch.tensor(part) + 1.0).to(values.dtype).expand_as(values)
    (gradient,) = torch.autograd.grad(counted, leaf, upstream)
    return _Found(counted.detach(), mask, gradient), draws


def _check_law(call: Call, inputs: tuple[Tensor, Tensor, Windows]) -> None:
    """Raise ValueError if a window's mean values, mask or gradient over seeds depend on how many windows there are."""
    calls = (
        [_called(call, inputs, places, seed)[0].window(0) for seed in range(_SEEDS)]
        for places in ([0], range(_WINDOWS))
    )
    for name, *samples in zip(_Found._fields, *(zip(*found, strict=True) for found in calls), strict=True):
        alone, together = (torch.stack(each) for each in samples)
        error = ((alone.var(0) + together.var(0)) / _SEEDS).sqrt()
        apart, mean = (alone.mean(0) - together.mean(0)).abs(), together.mean(0)
        if not bool((apart <= _ERRORS * error + 1e-4 * mean.abs() + 1e-6).all()):
            raise _depends(name, alone.mean(0), mean, f"by itself, on average over {_SEEDS} seeds,")


def _depends(name: str, alone: Tensor, together: Tensor, how: str) -> ValueError:
    """Return the error that a window's values, mask or gradient depend on others."""
    alone, together = alone.flatten(), together.flatten()
    most = (alone - together).nan_to_num().abs().argsort(descending=True)[:3]
    return ValueError(
        f"its function must treat each window alone, and has {name} {alone[most].tolist()} of a window {how} and "
        f"{together[most].tolist()} next to others; subclass Objective to look across windows"
    )


def _same(found: Tensor, expected: Tensor) -> bool:
    """Return whether two calls of a function returned the same, up to rounding."""
    return torch.allclose(found.double(), expected.double(), rtol=1e-4, atol=1e-6, equal_nan=True)

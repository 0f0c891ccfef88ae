"""The probe of functions: what is refused before a model is loaded, what is allowed, and that it leaves no trace."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tiny_drafters import eagle3_and_head
from torch import Tensor

from aurora_rl.objectives import Windows, check_settings, forward_kl, get_objective, overlap, register_objective
from aurora_rl.objectives.function_probe import probe_function

Found = tuple[Tensor, Tensor]


def kl(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return forward_kl(log_p, log_q), windows.valid


# ---- across windows ------------------------------------------------------------------------------------------------


def centred(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    value = forward_kl(log_p, log_q)
    return value - value.mean(), windows.valid


def best_half(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    value = forward_kl(log_p, log_q)
    return value, windows.valid & (value <= value.median(1, keepdim=True).values)


def two_windows_on(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return forward_kl(log_p, log_q) * overlap(log_p, log_q).detach().roll(2, 1), windows.valid


def by_their_number(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return forward_kl(log_p, log_q) / windows.valid.shape[1], windows.valid


def mean_of_its_request(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    value = forward_kl(log_p, log_q)
    same = (windows.request[:, None] == windows.request).to(value.dtype)
    return value @ (same / same.sum(0)), windows.valid


def gradient_alone(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    value = forward_kl(log_p, log_q)
    return value - value.mean() + value.mean().detach(), windows.valid


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (centred, "values"),
        (best_half, "values|mask"),
        (two_windows_on, "values"),
        (by_their_number, "values"),
        (mean_of_its_request, "values"),
        (gradient_alone, "gradient"),
    ],
)
@pytest.mark.parametrize("steps", [1, 3])
def test_a_function_that_looks_across_windows_is_refused(function: Callable[..., Found], name: str, steps: int) -> None:
    with pytest.raises(ValueError, match=f"must treat each window alone, and has ({name}) .* by itself and .* next to"):
        probe_function(function, steps)


def centred_dropout(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    value = forward_kl(log_p, log_q)
    return (value - value.mean()) * torch.rand(value.shape), windows.valid


def dropout_by_their_number(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    value = torch.nn.functional.dropout(forward_kl(log_p, log_q), 0.5)
    return value / value.shape[1], windows.valid


def exactly_half(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    noise = torch.rand(windows.valid.shape)
    return forward_kl(log_p, log_q), windows.valid & (noise <= noise.median(1, keepdim=True).values)


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (centred_dropout, "next to copies of it"),
        (dropout_by_their_number, "by itself, on average over 128 seeds"),
        (exactly_half, "by itself, on average over 128 seeds"),
    ],
)
def test_a_random_function_that_looks_across_windows_is_refused(function: Callable[..., Found], how: str) -> None:
    with pytest.raises(ValueError, match=f"must treat each window alone, and has .* of a window {how}"):
        probe_function(function, 3)


# ---- called again --------------------------------------------------------------------------------------------------


def test_a_function_that_returns_something_else_when_called_again_is_refused() -> None:
    own, calls = torch.Generator().manual_seed(0), [0]

    def by_its_generator(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        return forward_kl(log_p, log_q) * torch.rand(log_q.shape[:2], generator=own), windows.valid

    def by_numpy(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        return forward_kl(log_p, log_q) * float(np.random.rand()), windows.valid  # noqa: NPY002

    def by_python(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        return forward_kl(log_p, log_q) * random.random(), windows.valid

    def warming_up(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        calls[0] += 1
        return forward_kl(log_p, log_q) * calls[0], windows.valid

    for function in (by_its_generator, by_numpy, by_python, warming_up):
        with pytest.raises(ValueError, match="must return the same when it is called again with the same random state"):
            probe_function(function, 3)


# ---- arguments and gradients ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda log_p, log_q, windows: windows.rows.clamp_(min=0), "windows.rows"),
        (lambda log_p, log_q, windows: windows.valid.logical_and_(windows.rows >= 0), "windows.valid"),
        (lambda log_p, log_q, windows: windows.request.add_(1), "windows.request"),
        (lambda log_p, log_q, windows: log_p.clamp_(min=-5), "log_p"),
        (lambda log_p, log_q, windows: log_q.clamp_(min=-5), "log_q"),
    ],
)
def test_a_function_that_changes_its_arguments_is_refused(change: Callable[..., Any], name: str) -> None:
    def changing(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        change(log_p, log_q, windows)
        return kl(log_p, log_q, windows)

    with pytest.raises(ValueError, match=f"must leave its arguments as they are, and changes {name} in place"):
        probe_function(changing, 3)


def test_a_function_whose_values_have_no_gradient_is_refused() -> None:
    def detached(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        return forward_kl(log_p, log_q.detach()), windows.valid

    def frozen(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        with torch.no_grad():
            return kl(log_p, log_q, windows)

    for function in (detached, frozen):
        with pytest.raises(ValueError, match="values have no gradient in log_q, so that nothing would learn"):
            probe_function(function, 3)


def test_a_row_that_a_texts_token_has_not_is_in_the_probe() -> None:
    def text(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
        return -log_q.gather(-1, windows.rows[..., None])[..., 0], windows.valid

    register_objective("probed_text")(text)
    with pytest.raises(
        ValueError, match="objective 'probed_text': its function fails on a text of five tokens: .*index"
    ):
        check_settings({"name": "probed_text"})


# ---- what is allowed -----------------------------------------------------------------------------------------------


def dropout(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return torch.nn.functional.dropout(forward_kl(log_p, log_q), 0.5), windows.valid


def subset(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return forward_kl(log_p, log_q), windows.valid & (torch.rand(windows.valid.shape) < 0.5)


def noisy(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return forward_kl(log_p, (log_q + torch.randn_like(log_q)).log_softmax(-1)), windows.valid


def one_number_a_call(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return forward_kl(log_p, log_q) * torch.rand(()), windows.valid


def likeliest(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    top = log_p.topk(100)
    return -(top.values.exp() * log_q.gather(-1, top.indices)).sum(-1), torch.ones_like(windows.valid)


def not_a_number_where_nothing_counts(log_p: Tensor, log_q: Tensor, windows: Windows) -> Found:
    return torch.where(windows.valid, forward_kl(log_p, log_q), torch.nan), windows.valid


ALLOWED = [kl, dropout, subset, noisy, one_number_a_call, likeliest, not_a_number_where_nothing_counts]


@pytest.mark.parametrize("function", ALLOWED)
def test_what_is_allowed_is_accepted_whatever_the_random_state_which_stays(function: Callable[..., Found]) -> None:
    drafter, head = eagle3_and_head()
    register_objective(f"probed_{function.__name__}")(function)
    for seed, steps in ((0, None), (1, 1), (2, 5)):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        with torch.no_grad():
            get_objective(f"probed_{function.__name__}")(drafter, head, steps=steps)
        assert torch.equal(torch.get_rng_state(), state)

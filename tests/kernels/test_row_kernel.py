"""The Triton kernel against PyTorch's closed forms, through Triton's interpreter: without a GPU, and without bf16."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from aurora_kernels import CLOSED_FORMS, ClosedForm, HeadTarget, closed_form, two_head_loss

pytest.importorskip("triton")

# The decorator of a kernel decides when it is imported, so that the tests run in a process of their own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the first test starts")
SETTINGS: dict[str, list[dict[str, float]]] = {
    "jensen_shannon": [{}, {"beta": 0.1}],
    "skewed_kl": [{}, {"skew": 0.0}],
    "hybrid_overlap": [{}, {"decay": 0.0}],
}
CASES = [(name, settings) for name in CLOSED_FORMS for settings in SETTINGS.get(name, [{}])]


@pytest.mark.skipif(INTERPRETED, reason="is the process that this test starts")
def test_through_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def laws(width: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a target and logits of a drafter: a usual row, and three that are hard."""
    generator = torch.Generator().manual_seed(0)
    log_p = (3 * torch.randn(4, width, generator=generator)).log_softmax(-1)
    logits = 3 * torch.randn(4, width, generator=generator)
    log_p[1] -= 0.7  # part of the mass
    log_p[2] = log_p[2].masked_fill(log_p[2] < log_p[2].topk(3).values[-1], -math.inf).log_softmax(-1)
    log_p[3] = torch.where(torch.arange(width) < 9, log_p[3], -math.inf).log_softmax(-1)
    logits[3, :9] = -300.0  # apart
    return log_p, logits


def run(form: ClosedForm, log_p: Tensor, logits: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Values, agreement and gradient by the kernel."""
    from aurora_kernels import row_kernel

    assert row_kernel.takes(form, logits)
    gradient, best = logits.clone(), log_p.argmax(-1)
    values, agreement = row_kernel.row_values(form, log_p, best, gradient, temperature=temperature, gradient=True)
    return values, agreement, gradient


@interpreted
@pytest.mark.parametrize(("name", "settings"), CASES)
def test_values_and_gradients_are_those_of_pytorch(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aurora_kernels import row_kernel

    monkeypatch.setattr(row_kernel, "_BLOCK", 32)
    log_p, logits = laws(37)  # which no block divides
    form = closed_form(name, **settings)
    values, agreement, gradient = run(form, log_p, logits, 0.7)
    expected, slope = form.function(log_p, (logits / 0.7).log_softmax(-1))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
    # A token that the target excludes costs 1e4 nats in reverse KL, and rounding is by that.
    error = (gradient - slope).abs().amax(-1)
    assert bool((error <= 2e-6 * expected.abs().clamp(min=1)).all())
    assert agreement.tolist() == (logits.argmax(-1) == log_p.argmax(-1)).tolist()


@interpreted
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_what_is_not_a_number_shows_in_its_row_alone(name: str) -> None:
    log_p, logits = (x[:2, :16] for x in laws(16))
    expected, _, slope = run(closed_form(name), log_p, logits)
    for spoiled in (log_p, logits):
        kept, spoiled[1, 4] = spoiled[1].clone(), math.nan
        values, _, gradient = run(closed_form(name), log_p, logits)
        assert values.isnan().tolist() == [False, True]
        assert torch.equal(values[0], expected[0]) and torch.equal(gradient[0], slope[0])
        spoiled[1] = kept


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_two_head_loss_uses_it(dtype: torch.dtype, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, found = torch.Generator().manual_seed(0), []
    states, head = (torch.randn(size, 8, generator=generator).to(dtype).requires_grad_() for size in (7, 37))
    target = HeadTarget(*(torch.randn(size, 8, generator=generator).to(dtype) for size in (7, 70)))
    form = closed_form("negative_log_overlap")
    for chosen in (form, ClosedForm(form.function)):  # the second has no name, and so no kernel
        values, agreement = two_head_loss(
            states, head, target, chosen, draft_vocab=torch.arange(37),
            renormalize=renormalize, temperature=1.5, rows_per_chunk=3,
        )  # fmt: skip
        found.append([values, agreement, *torch.autograd.grad(values.sum(), (states, head))])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for by_kernel, by_pytorch in zip(*found, strict=True):
        torch.testing.assert_close(by_kernel.float(), by_pytorch.float(), rtol=tolerance, atol=tolerance)


@interpreted
def test_other_functions_and_float64_are_left_to_pytorch() -> None:
    from aurora_kernels import row_kernel

    form, logits = closed_form("forward_kl"), torch.zeros(2, 3)
    assert row_kernel.takes(form, logits) and not row_kernel.takes(form, logits.double())
    assert not row_kernel.takes(ClosedForm(form.function), logits) and not row_kernel.takes(form.function, logits)
    values, agreement = row_kernel.row_values(
        form, logits[:0], torch.zeros(0, dtype=torch.int64), logits[:0], temperature=1.0, gradient=True
    )
    assert values.shape == agreement.shape == (0,)


@interpreted
def test_logits_stay_where_no_gradient_is_wanted() -> None:
    from aurora_kernels import row_kernel

    log_p, logits = laws(16)
    kept = logits.clone()
    row_kernel.row_values(closed_form("forward_kl"), log_p, log_p.argmax(-1), logits, temperature=1.0, gradient=False)
    assert torch.equal(logits, kept)

"""The Triton kernel against PyTorch's closed forms, through Triton's interpreter: without a GPU, and without bf16."""

from __future__ import annotations

import importlib
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from closed_form_cases import CASES
from torch import Tensor

from aurora_kernels import CLOSED_FORMS, ClosedForm, HeadTarget, closed_form, two_head_loss

pytest.importorskip("triton")
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # where a GPU has inf, too
module = importlib.import_module("aurora_kernels.two_head_loss")  # which the function hides


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
    from aurora_kernels import two_head_loss_triton

    gradient, best = logits.clone(), log_p.argmax(-1)
    values, agreement = two_head_loss_triton.row_values(
        form, log_p, best, best, gradient, temperature=temperature, gradient=True
    )
    return values, agreement, gradient


@pytest.mark.parametrize(("name", "settings"), CASES)
def test_values_and_gradients_are_those_of_pytorch(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aurora_kernels import two_head_loss_triton

    monkeypatch.setattr(two_head_loss_triton, "_BLOCK", 32)
    log_p, logits = laws(37)  # which no block divides
    form = closed_form(name, **settings)
    values, agreement, gradient = run(form, log_p, logits, 0.7)
    expected, slope = form.function(log_p, (logits / 0.7).log_softmax(-1))
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)
    # A token that the target excludes costs 1e4 nats in reverse KL, and rounding is by that.
    error = (gradient - slope).abs().amax(-1)
    assert bool((error <= 2e-6 * expected.abs().clamp(min=1)).all())
    assert agreement.tolist() == (logits.argmax(-1) == log_p.argmax(-1)).tolist()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("renormalize", [True, False])
def test_the_two_head_loss_uses_it(dtype: torch.dtype, renormalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    generator, found = torch.Generator().manual_seed(0), []
    states, head = (torch.randn(size, 8, generator=generator).to(dtype).requires_grad_() for size in (7, 37))
    target = HeadTarget(*(torch.randn(size, 8, generator=generator).to(dtype) for size in (7, 70)))
    form = closed_form("negative_log_overlap")
    for kernel in (True, False):
        monkeypatch.setattr(module, "_has_row_kernel", lambda *args, kernel=kernel: kernel)
        values, agreement = two_head_loss(
            states, head, target, form, draft_vocab=torch.arange(37),
            renormalize=renormalize, temperature=1.5, rows_per_chunk=3,
        )  # fmt: skip
        found.append([values, agreement, *torch.autograd.grad(values.sum(), (states, head))])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for by_kernel, by_pytorch in zip(*found, strict=True):
        torch.testing.assert_close(by_kernel.float(), by_pytorch.float(), rtol=tolerance, atol=tolerance)


def test_the_kernel_is_for_named_forms_on_a_gpu() -> None:
    from aurora_kernels import two_head_loss_triton

    form, logits, none = closed_form("forward_kl"), torch.zeros(2, 3), torch.zeros(0, dtype=torch.int64)
    assert not module._has_row_kernel(form, logits)  # on a CPU
    values, agreement = two_head_loss_triton.row_values(
        form, logits[:0], none, none, logits[:0], temperature=1.0, gradient=True
    )
    assert values.shape == agreement.shape == (0,)


def test_logits_stay_where_no_gradient_is_wanted() -> None:
    from aurora_kernels import two_head_loss_triton

    log_p, logits = laws(16)
    kept, best = logits.clone(), log_p.argmax(-1)
    two_head_loss_triton.row_values(
        closed_form("forward_kl"), log_p, best, best, logits, temperature=1.0, gradient=False
    )
    assert torch.equal(logits, kept)


COMPILE = """
import types, torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from aurora_kernels import CLOSED_FORMS, closed_form
from aurora_kernels.two_head_loss_triton import row_values

target = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: target, get_current_device=lambda: 0, get_current_stream=lambda device: 0
))
# In place of a launch.
JITFunction.__getitem__ = lambda self, grid: lambda *args, **more: self.run(*args, grid=grid, warmup=True, **more)
for name in CLOSED_FORMS:
    logits, choices = torch.zeros(2, 300, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64)
    row_values(closed_form(name), torch.zeros(2, 300), choices, choices, logits, temperature=1.0, gradient=True)
    print(name)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has NVIDIA's assembler on Linux only")
def test_every_form_compiles_for_a_gpu(tmp_path: Path) -> None:
    # The interpreter takes more Python than the compiler does, which needs no GPU.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    result = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == list(CLOSED_FORMS)

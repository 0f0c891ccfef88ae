from __future__ import annotations

import math

import pytest
import torch

from aurora_rl.plausible import LARGEST, implausible

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted(dtype: torch.dtype, value: float) -> None:
    tensor = torch.zeros(3, 4, dtype=dtype)
    assert implausible(tensor) is None
    tensor[1, 2] = tensor[2, 0] = value
    assert implausible(tensor) == "has 2 values that are infinite or not a number"


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_limit_is_one_of_magnitude(sign: int) -> None:
    assert implausible(torch.tensor([0.0, sign * LARGEST])) is None
    assert implausible(torch.tensor([0.0, sign * 1.01 * LARGEST])) == "has 1 value beyond 1e+08"
    assert implausible(torch.full((3,), sign * 3e37)) == "has 3 values beyond 1e+08"


def test_8_bit_floats_are_looked_at_too() -> None:
    tensor = torch.tensor([1.0, math.nan]).to(torch.float8_e5m2)
    assert implausible(tensor) == "has 1 value that is infinite or not a number"


def test_squares_and_their_sums_stay_finite() -> None:
    assert torch.full((100_000,), LARGEST).square().sum().isfinite()

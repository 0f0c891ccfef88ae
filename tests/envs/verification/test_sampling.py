"""Warps against transformers, and the noise: known answers and statistics."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from warped import warp_logits

from aurora_rl.envs.verification.rules import SampleAndMatch
from aurora_rl.envs.verification.sampling import served_log_probs
from aurora_rl.sampling_params import SamplingBatch

# ---------------------------------------------------------------------------------------------------------------------
# Warps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [50, 3000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [
        *((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.8, 0.0), (20, 0.6, 0.0), (4000, 0.05, 0.0), (0, 0.999, 0.0)),
        *((0, 1.0, 0.1), (0, 1.0, 1.0), (5, 1.0, 0.2), (0, 0.8, 0.3), (20, 0.6, 0.05)),
    ],
)
def test_warp_agrees_with_transformers(
    dtype: torch.dtype, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Of whose processors min-p is applied before the others, as vLLM does."""
    # A temperature of 8 over 3000 tokens makes a nucleus wider than the likeliest 1024.
    logits = torch.randn(4, vocab_size, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if min_p:
        expected = MinPLogitsWarper(min_p)(None, expected)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = warp_logits(logits, temperature, top_k, top_p, min_p)
    assert got.dtype == dtype
    assert torch.equal(got.isinf(), expected.isinf())
    # Transformers divides before it shifts; float32 scores of up to 40 then carry errors of a few 1e-6.
    torch.testing.assert_close(got, expected.log_softmax(-1), atol=2e-5, rtol=1e-5)


def test_warp_takes_each_row_for_itself() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 2, 2000, generator=generator)
    temperature = torch.tensor([0.2, 1.0, 1.0, 9.0, 1.0, 0.7])[:, None]
    top_k = torch.tensor([0, 3, 0, 0, 50, 0])[:, None]
    top_p = torch.tensor([1.0, 1.0, 0.7, 0.999, 0.4, 0.1])[:, None]
    min_p = torch.tensor([0.0, 0.9, 0.2, 0.0, 0.6, 0.3])[:, None]
    together = warp_logits(logits, temperature, top_k, top_p, min_p)
    for b in range(6):
        alone = warp_logits(logits[b, 1], temperature[b].item(), int(top_k[b]), top_p[b].item(), min_p[b].item())
        assert torch.equal(together[b, 1], alone)


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p", "support"),
    [
        ([1.0, 3.0, 2.0, 2.0, 0.0], 2, 1.0, [1, 2, 3]),  # top-k keeps what ties with the k-th
        ([0.0, 0.0, 0.0, 0.0], 0, 0.5, [0, 1]),  # top-p needs two of four equal tokens: the lowest ids
        ([0.0, 0.0, 0.0, 0.0], 0, 0.51, [0, 1, 2]),
        ([0.0, 5.0, 0.0, 5.0], 0, 0.4, [1]),
        ([0.0, 0.0, 0.0, 9.0], 0, 1e-6, [3]),  # at least one
        ([2.0, -math.inf, 1.0, -math.inf], 3, 0.999999, [0, 2]),  # what the engine forbade stays forbidden
        ([1.0, 3.0, 2.0, 2.0, 0.0], 2, 0.99, [1, 2, 3]),  # top-p after top-k, over what top-k left
    ],
)
def test_support_at_ties(logits: list[float], top_k: int, top_p: float, support: list[int]) -> None:
    warped = warp_logits(torch.tensor(logits), 1.0, top_k, top_p)
    assert warped.isfinite().nonzero()[:, 0].tolist() == support
    assert warped.exp().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("logits", "top_k", "top_p", "min_p", "support"),
    [
        ([3.0, 1.0, 3.0, 2.999], 0, 1.0, 1.0, [0, 2]),  # what ties with the likeliest stays
        ([0.0, -1.0, -2.0, -3.0], 0, 1.0, math.exp(-2.01), [0, 1, 2]),
        ([0.0, -1.0, -2.0, -3.0], 0, 1.0, math.exp(-1.99), [0, 1]),
        ([0.0, -1.0, -2.0, -3.0], 1, 1.0, math.exp(-2.01), [0]),
        ([2.0, -math.inf, 1.0, -math.inf], 0, 1.0, 1e-30, [0, 2]),
    ],
)
def test_support_of_min_p(logits: list[float], top_k: int, top_p: float, min_p: float, support: list[int]) -> None:
    warped = warp_logits(torch.tensor(logits), 1.0, top_k, top_p, min_p)
    assert warped.isfinite().nonzero()[:, 0].tolist() == support
    assert warped.exp().sum().item() == pytest.approx(1.0)


def test_min_p_comes_after_the_temperature_and_before_top_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.1, 0.1, 0.1]).log()
    assert warp_logits(logits, 1.0, 0, 0.55).isfinite().sum() == 2
    assert warp_logits(logits, 1.0, 0, 0.55, 0.5).isfinite().sum() == 1  # 0.4 of the 0.7 that min-p leaves
    assert warp_logits(logits, 4.0, 0, 1.0, 0.5).isfinite().sum() == 5  # 0.1 is 0.71 of 0.4 there


def test_mass_of_exactly_top_p_is_enough() -> None:
    # Temperature 1 over 8, 4, 2, 1, 1 sixteenths: the first two hold exactly 0.75, which float32 represents.
    logits = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0]).div(16).log()
    assert warp_logits(logits.double(), 1.0, 0, 0.7499).isfinite().sum() == 2
    assert warp_logits(logits.double(), 1.0, 0, 0.7501).isfinite().sum() == 3


def test_low_precision_is_computed_in_float32() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0], dtype=torch.bfloat16)
    assert torch.equal(warp_logits(logits, 0.7), warp_logits(logits.float(), 0.7))


def test_low_temperature_keeps_the_distance_of_close_logits() -> None:
    # Divided before they are shifted, both would round to a multiple of 8 and be 8 apart.
    low, high = warp_logits(torch.tensor([100.0, 100.0 + 2**-17]), 1e-6).tolist()
    assert high - low == pytest.approx(2**-17 / 1e-6, rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------------------------------


def test_noise_samples_the_distribution_it_is_added_to() -> None:
    """Gumbel-max through the whole rule: 30 000 requests, one plain token each."""
    count = 30_000
    logits = torch.tensor([2.0, 0.0, 1.0, 1.5, -1.0, -4.0], dtype=torch.float64)
    sampling = SamplingBatch(
        torch.full((count,), 0.8), torch.full((count,), 5), torch.ones(count), torch.zeros(count), torch.arange(count)
    )
    nodes = torch.empty(count, 0, dtype=torch.int64)
    plain = SampleAndMatch().verify(
        logits.expand(count, 1, 6), nodes, nodes, nodes.bool(), torch.full((count,), 11), sampling
    )
    expected = warp_logits(logits, 0.8, 5).exp() * count
    drawn = plain.bonus_token.bincount(minlength=6)
    assert drawn[5] == 0
    chi_square = ((drawn[:5] - expected[:5]) ** 2 / expected[:5]).sum()
    assert chi_square < 23.5  # 4 degrees of freedom, one in 10 000


def test_served_law_of_greedy_and_sampled_rows() -> None:
    logits = torch.randn(4, 50, dtype=torch.float64)
    logits[2, 7] = logits[2, 3] = 9.0  # of equal logits the lowest id
    temperature, top_k = torch.tensor([0.0, 0.7, 0.0, 1.3]), torch.tensor([3, 0, 0, 5])
    top_p, min_p = torch.tensor([0.5, 0.9, 1.0, 1.0]), torch.tensor([0.0, 0.05, 0.5, 0.2])
    log_p = served_log_probs(logits, temperature, top_k, top_p, min_p)
    for row in (0, 2):
        assert log_p[row].exp().nonzero().tolist() == [[int(logits[row].argmax())]] and float(log_p[row].max()) == 0.0
    for row in (1, 3):
        assert torch.equal(log_p[row], warp_logits(logits[row], temperature[row], top_k[row], top_p[row], min_p[row]))


def test_served_log_probs_of_some_tokens_are_columns_of_all() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)).double()
    temperature, top_k = torch.tensor([0.0, 1.0, 0.7, 0.0, 2.0, 1.0]), torch.tensor([0, 0, 7, 3, 0, 12])
    top_p, tokens = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.9, 0.8]), torch.tensor([39, 3, 17, int(logits[0].argmax())])
    how = temperature, top_k, top_p, torch.tensor([0.5, 0.0, 0.0, 0.0, 0.1, 0.3])
    some = served_log_probs(logits, *how, tokens)
    assert torch.equal(some, served_log_probs(logits, *how)[:, tokens])
    assert some[0].tolist() == [-torch.inf] * 3 + [0.0]

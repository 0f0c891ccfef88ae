"""Warps against transformers, and the noise: known answers and statistics."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from warped import warp_logits

from aurora_rl.envs.verification import sampling
from aurora_rl.envs.verification.rules import SampleAndMatch
from aurora_rl.envs.verification.sampling import argmax, gumbel, served_log_probs, uniform
from aurora_rl.sampling_params import SamplingBatch

# ---------------------------------------------------------------------------------------------------------------------
# Warps
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("vocab_size", [50, 3000])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 8.0])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.8), (20, 0.6), (4000, 0.05), (0, 0.999)])
def test_warp_agrees_with_transformers(
    dtype: torch.dtype, vocab_size: int, temperature: float, top_k: int, top_p: float
) -> None:
    # A temperature of 8 over 3000 tokens makes a nucleus wider than the likeliest 1024.
    logits = torch.randn(4, vocab_size, dtype=dtype, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = warp_logits(logits, temperature, top_k, top_p)
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
    together = warp_logits(logits, temperature, top_k, top_p)
    for b in range(6):
        alone = warp_logits(logits[b, 1], temperature[b].item(), int(top_k[b]), top_p[b].item())
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


def slow_bits(seed: int, position: int, token: int) -> int:
    """The 32 bits under the noise, in Python's unbounded integers."""

    def triple32(x: int, key: int = 0) -> int:
        x = (x ^ (x >> 17)) * 0xED5AD4BB % 2**32
        x = (x ^ (x >> 11) ^ key) * 0xAC4C1B51 % 2**32
        x = (x ^ (x >> 15)) * 0x31848BAB % 2**32
        return x ^ (x >> 14)

    low, high = seed % 2**32, seed >> 32
    first, second = (triple32(triple32(low ^ salt, high) ^ position) for salt in (0x6A09E667, 0xBB67AE85))
    return triple32(token ^ first, second)


def uniforms(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The uniform numbers that the noise is computed from, `[..., V]`."""
    return gumbel(seeds, positions, vocab_size).double().neg().exp().neg().exp()


def test_noise_equals_unbounded_integer_arithmetic() -> None:
    seeds = [0, 1, 12345, 2**32 - 1, 2**32, 2**63 - 1]
    positions = [0, 1, 4095, 2**31, 2**32 - 1]
    for seed, position in product(seeds, positions):
        bits = [slow_bits(seed, position, token) for token in range(20)]
        expected = [-math.log(-math.log((h + 0.5) / 2**32)) for h in bits]
        got = gumbel(torch.tensor(seed), torch.tensor(position), 20)
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-7, atol=1e-7)


def test_noise_known_answers() -> None:
    """Recorded texts replay only while these stand."""
    got = gumbel(torch.tensor([0, 42, 2**40 + 7]), torch.tensor([0, 1000, 17]), 49152)
    assert got.dtype == torch.float32
    expected = [
        [5.32821655, 0.68709779, 0.44831195, -0.14927845],
        [1.69774413, 2.74249101, -0.10027692, 4.97281885],
        [1.59825921, 0.95091546, 0.42039430, 0.65555674],
    ]
    torch.testing.assert_close(got[:, [0, 1, 2, 49151]], torch.tensor(expected), rtol=0, atol=1e-6)


def test_noise_depends_on_its_coordinates_only() -> None:
    seeds, positions = torch.tensor([5, 2**50, 9]), torch.tensor([[3], [2**31]])
    block = gumbel(seeds, positions, 300)
    assert block.shape == (2, 3, 300)
    for i, j in product(range(2), range(3)):
        assert torch.equal(block[i, j], gumbel(seeds[j], positions[i, 0], 300))
    assert torch.equal(block.flip(1), gumbel(seeds.flip(0), positions, 300))
    # A smaller vocabulary is a prefix.
    assert torch.equal(block[..., :7], gumbel(seeds, positions, 7))


def test_noise_is_finite_where_the_hash_is_all_zeros_or_all_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def extremes(x: Tensor, key: Tensor | int = 0) -> Tensor:
        return (torch.arange(x.shape[-1]) % 2 * (2**32 - 1)).expand_as(x)

    monkeypatch.setattr(sampling, "_hash", extremes)
    # -log(-log u) at u = 2**-33 and at 1 - 2**-33, where -log u is 2**-33: -log(33 log 2) and 33 log 2.
    expected = [-math.log(33 * math.log(2)), 33 * math.log(2)]
    assert gumbel(torch.tensor(0), torch.tensor(0), 2).tolist() == pytest.approx(expected, rel=1e-6)


def chi_square_z(counts: Tensor) -> float:
    """Chi-square of the counts against equal chances, as a number of standard deviations (Wilson and Hilferty)."""
    expected = counts.sum() / counts.numel()
    ratio = ((counts - expected) ** 2 / expected).sum().item() / (counts.numel() - 1)
    spread = 2 / (9 * (counts.numel() - 1))
    return (ratio ** (1 / 3) - (1 - spread)) / math.sqrt(spread)


# Everything is fixed by the seeds, so these either hold for ever or show a defect; 4.5 deviations leave room for the
# number of checks.
LIMIT = 4.5
# What neighbours look like in use: consecutive positions of a few requests with small, close seeds.
SEEDS, POSITIONS = torch.arange(16), torch.arange(1000, 1064)[:, None]


def test_uniform_numbers_are_uniform() -> None:
    u = uniforms(SEEDS, POSITIONS, 512)
    assert abs(chi_square_z((u * 1024).long().flatten().bincount(minlength=1024).double())) < LIMIT
    # Per token id over the rows, and per row over the token ids: no id and no row is favoured.
    for means, count in ((u.mean((0, 1)), u[..., 0].numel()), (u.mean(-1).flatten(), 512)):
        z = (means - 0.5) * math.sqrt(12 * count)
        assert z.abs().max() < LIMIT + 0.5
        assert abs(z.square().mean() - 1) < LIMIT * math.sqrt(2 / len(z))
    # The low bits too: a second digit of the uniform, 10 bits down. Float32 noise keeps it where noise is not extreme.
    fine = u[(u > 0.05) & (u < 0.95)] * 1024 % 1
    assert abs(chi_square_z((fine * 64).long().bincount(minlength=64).double())) < LIMIT


@pytest.mark.parametrize(
    ("axis", "step"), [("position", 1), ("position", 2), ("seed", 1), ("seed", 8), ("token", 1), ("token", 2)]
)
def test_neighbours_are_independent(axis: str, step: int) -> None:
    u = uniforms(SEEDS, POSITIONS, 512)
    dim = {"position": 0, "seed": 1, "token": 2}[axis]
    size = u.shape[dim] - step
    here, there = u.narrow(dim, 0, size).flatten(), u.narrow(dim, step, size).flatten()
    correlation = ((here - 0.5) * (there - 0.5)).mean().item() * 12
    assert abs(correlation) * math.sqrt(here.numel()) < LIMIT
    joint = ((here * 32).long() * 32 + (there * 32).long()).bincount(minlength=1024)
    assert abs(chi_square_z(joint.double())) < LIMIT


def test_diagonals_and_far_seeds_are_independent() -> None:
    """Rows that a sum or a xor of seed and position would confuse."""
    pairs = [
        (uniforms(torch.arange(64), torch.arange(1, 65), 2048), uniforms(torch.arange(1, 65), torch.arange(64), 2048)),
        (uniforms(torch.arange(64), torch.tensor(9), 2048), uniforms(torch.arange(64) + 2**32, torch.tensor(9), 2048)),
        (uniforms(torch.arange(64) << 32, torch.tensor(9), 2048), uniforms(torch.arange(64), torch.tensor(9), 2048)),
    ]
    for left, right in pairs:
        differ = (left != right).any(-1)
        joint = ((left[differ] * 32).long() * 32 + (right[differ] * 32).long()).flatten().bincount(minlength=1024)
        assert differ.sum() >= 63  # seed 0 shifted by 32 bits is seed 0
        assert abs(chi_square_z(joint.double())) < LIMIT


def test_noise_samples_the_distribution_it_is_added_to() -> None:
    """Gumbel-max through the whole rule: 30 000 requests, one plain token each."""
    count = 30_000
    logits = torch.tensor([2.0, 0.0, 1.0, 1.5, -1.0, -4.0], dtype=torch.float64)
    sampling = SamplingBatch(torch.full((count,), 0.8), torch.full((count,), 5), torch.ones(count), torch.arange(count))
    nodes = torch.empty(count, 0, dtype=torch.int64)
    plain = SampleAndMatch().verify(
        logits.expand(count, 1, 6), nodes, nodes, nodes.bool(), torch.full((count,), 11), sampling
    )
    expected = warp_logits(logits, 0.8, 5).exp() * count
    drawn = plain.bonus_token.bincount(minlength=6)
    assert drawn[5] == 0
    chi_square = ((drawn[:5] - expected[:5]) ** 2 / expected[:5]).sum()
    assert chi_square < 23.5  # 4 degrees of freedom, one in 10 000


def test_streams_are_independent_and_the_first_is_the_noise() -> None:
    token = torch.arange(512)
    first, second, third = (uniform(SEEDS[:, None], POSITIONS[..., None], token, stream) for stream in range(3))
    assert torch.equal(first.log().neg().log().neg().float(), gumbel(SEEDS, POSITIONS, 512))
    for left, right in ((first, second), (second, third), (first, third)):
        joint = ((left * 32).long() * 32 + (right * 32).long()).flatten().bincount(minlength=1024)
        assert abs(chi_square_z(joint.double())) < LIMIT
    # A stream is no other seed's, neighbours included.
    assert not bool((second[:, :-1] == first[:, 1:]).all(-1).any())
    # One token's number, asked for alone.
    assert float(uniform(SEEDS[3], POSITIONS[5, 0], torch.tensor(77), 1)) == float(second[5, 3, 77])


def test_served_law_of_greedy_and_sampled_rows() -> None:
    logits = torch.randn(4, 50, dtype=torch.float64)
    logits[2, 7] = logits[2, 3] = 9.0  # of equal logits the lowest id
    temperature, top_k = torch.tensor([0.0, 0.7, 0.0, 1.3]), torch.tensor([3, 0, 0, 5])
    top_p = torch.tensor([0.5, 0.9, 1.0, 1.0])
    log_p = served_log_probs(logits, temperature, top_k, top_p)
    for row in (0, 2):
        assert log_p[row].exp().nonzero().tolist() == [[int(logits[row].argmax())]] and float(log_p[row].max()) == 0.0
    for row in (1, 3):
        assert torch.equal(log_p[row], warp_logits(logits[row], temperature[row], top_k[row], top_p[row]))


def test_served_log_probs_of_some_tokens_are_columns_of_all() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(2)).double()
    temperature, top_k = torch.tensor([0.0, 1.0, 0.7, 0.0, 2.0, 1.0]), torch.tensor([0, 0, 7, 3, 0, 12])
    top_p, tokens = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.9, 0.8]), torch.tensor([39, 3, 17, int(logits[0].argmax())])
    some = served_log_probs(logits, temperature, top_k, top_p, tokens)
    assert torch.equal(some, served_log_probs(logits, temperature, top_k, top_p)[:, tokens])
    assert some[0].tolist() == [-torch.inf] * 3 + [0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_argmax_is_the_first_of_equals(dtype: torch.dtype) -> None:
    """Text must not depend on which of two equal tokens a kernel meets first: plain decoding takes the lowest id."""
    scores = torch.randint(0, 6, (64, 5000), generator=torch.Generator().manual_seed(0)).to(dtype)
    first = [row.index(max(row)) for row in scores.tolist()]
    assert argmax(scores).tolist() == first

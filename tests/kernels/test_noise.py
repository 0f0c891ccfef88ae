"""Keyed noise: its bits, its independence, and what is drawn by it."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from aurora_kernels import noise
from aurora_kernels.noise import argmax, gumbel, gumbel_argmax, uniform


def slow_bits(seed: int, position: int, token: int) -> int:
    """The 32 bits under the noise, in Python's unbounded integers."""

    def triple32(x: int, key: int = 0) -> int:
        x = (x ^ (x >> 17)) * 0xED5AD4BB % 2**32
        x = (x ^ (x >> 11) ^ key) * 0xAC4C1B51 % 2**32
        x = (x ^ (x >> 15)) * 0x31848BAB % 2**32
        return x ^ (x >> 14)

    low, high = seed % 2**32, (seed >> 32) % 2**32
    first, second = (triple32(triple32(low ^ salt, high) ^ position) for salt in (0x6A09E667, 0xBB67AE85))
    return triple32(token ^ first, second)


def uniforms(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """The uniform numbers that the noise is computed from, `[..., V]`."""
    return gumbel(seeds, positions, vocab_size).double().neg().exp().neg().exp()


def test_noise_equals_unbounded_integer_arithmetic() -> None:
    seeds = [0, 1, 12345, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**32), -(2**63)]
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

    monkeypatch.setattr(noise, "_hash", extremes)
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


@pytest.mark.parametrize("shape", [(64, 5000), (64, 4992), (2, 32, 4992), (3, 64), (0, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_argmax_is_the_first_of_equals(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Text must not depend on which of two equal tokens a kernel meets first: plain decoding takes the lowest id."""
    scores = torch.randint(0, 6, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    first = [row.index(max(row)) for row in scores.flatten(0, -2).tolist()]
    assert argmax(scores).flatten().tolist() == first and argmax(scores).shape == shape[:-1]


@pytest.mark.parametrize("size", [64, 128, 100])
def test_argmax_of_rows_that_are_not_finite_is_pytorch_s(size: int) -> None:
    scores = torch.randn(4, size, generator=torch.Generator().manual_seed(0))
    scores[0, 70 % size], scores[1, 3], scores[2] = torch.nan, torch.inf, -torch.inf
    scores[0, 5] = torch.inf
    assert torch.equal(argmax(scores), scores.argmax(-1))


def test_draws_are_those_of_the_distribution_and_of_their_keys_alone() -> None:
    count, scores = 20_000, torch.tensor([1.0, 0.0, -torch.inf, 2.0])
    seed, position = torch.arange(count), torch.full((count,), 11)
    drawn = gumbel_argmax(scores.expand(count, 4), seed, position)
    expected = scores.softmax(-1) * count
    counts = drawn.bincount(minlength=4)
    assert counts[2] == 0
    kept = torch.tensor([0, 1, 3])
    assert ((counts - expected)[kept] ** 2 / expected[kept]).sum() < 13.8  # 2 degrees of freedom, one in 1,000
    assert torch.equal(gumbel_argmax(scores.expand(5, 4) + 7, seed[:5], position[:5]), drawn[:5]), "no scale matters"

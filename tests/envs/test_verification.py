"""Verification rules: the warps, the noise, and the proof that what is delivered is the target's own text.

Losslessness is shown twice. Exactly: a toy target with rational probabilities draws by inverse CDF from one four-sided
coin per position, every outcome of the coins and every small tree is enumerated, and integers are compared. And token
by token: the real rule with its real noise against a sampler of one token at a time. Both checks then have to reject
wrong rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from aurora_rl.envs import verification
from aurora_rl.envs.verification import (
    RULES,
    Greedy,
    SampleAndMatch,
    SamplingBatch,
    SamplingParams,
    Verdict,
    VerificationRule,
    descend,
    get_rule,
    gumbel,
    register_rule,
    settle,
    warp_logits,
)
from aurora_rl.trees import accepted_path, depths, last_accepted, valid_nodes

# ---------------------------------------------------------------------------------------------------------------------
# Sampling parameters
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "cure"),
    [
        ("temperature", -0.5, "give a finite number >= 0"),
        ("temperature", math.inf, "give a finite number >= 0"),
        ("temperature", math.nan, "give a finite number >= 0"),
        ("top_k", -1, "give a number >= 0"),
        ("top_p", 0.0, "0 < top_p <= 1"),
        ("top_p", 1.5, "0 < top_p <= 1"),
        ("top_p", math.nan, "0 < top_p <= 1"),
        ("seed", -1, r"0 <= seed < 2\*\*63"),
        ("seed", 2**63, r"0 <= seed < 2\*\*63"),
    ],
)
def test_params_out_of_range_name_value_and_cure(field: str, value: Any, cure: str) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}; .*{cure}"):
        SamplingParams(**{field: value})


def test_batch_of_params() -> None:
    batch = SamplingBatch.from_params([SamplingParams(0.5, 7, 0.25, 2**63 - 1), None])
    assert batch.temperature.tolist() == [0.5, 0.0] and batch.temperature.dtype == torch.float32
    assert batch.top_k.tolist() == [7, 0] and batch.top_k.dtype == torch.int64
    assert batch.top_p.tolist() == [0.25, 1.0] and batch.top_p.dtype == torch.float32
    assert batch.seed.tolist() == [2**63 - 1, 0] and batch.seed.dtype == torch.int64


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


def test_temperature_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature is 0.0; give > 0, and take the argmax"):
        warp_logits(torch.zeros(2, 3), torch.tensor([1.0, 0.0]))


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
    """The uniform numbers behind the noise, `[..., V]`."""
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

    monkeypatch.setattr(verification, "_hash", extremes)
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
    one, other = u.narrow(dim, 0, size).flatten(), u.narrow(dim, step, size).flatten()
    correlation = ((one - 0.5) * (other - 0.5)).mean().item() * 12
    assert abs(correlation) * math.sqrt(one.numel()) < LIMIT
    joint = ((one * 32).long() * 32 + (other * 32).long()).bincount(minlength=1024)
    assert abs(chi_square_z(joint.double())) < LIMIT


def test_diagonals_and_far_seeds_are_independent() -> None:
    """Rows that a sum or a xor of seed and position would confuse."""
    pairs = [
        (uniforms(torch.arange(64), torch.arange(1, 65), 2048), uniforms(torch.arange(1, 65), torch.arange(64), 2048)),
        (uniforms(torch.arange(64), torch.tensor(9), 2048), uniforms(torch.arange(64) + 2**32, torch.tensor(9), 2048)),
        (uniforms(torch.arange(64) << 32, torch.tensor(9), 2048), uniforms(torch.arange(64), torch.tensor(9), 2048)),
    ]
    for one, other in pairs:
        differ = (one != other).any(-1)
        joint = ((one[differ] * 32).long() * 32 + (other[differ] * 32).long()).flatten().bincount(minlength=1024)
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


# ---------------------------------------------------------------------------------------------------------------------
# Registry and shapes
# ---------------------------------------------------------------------------------------------------------------------


def test_rules_by_name() -> None:
    assert get_rule("greedy") is Greedy and get_rule("sample_and_match") is SampleAndMatch
    with pytest.raises(ValueError, match="'sample_match'; choose one of sample_and_match, greedy"):
        get_rule("sample_match")
    with pytest.raises(ValueError, match="'gredy'; choose one of greedy, sample_and_match"):
        get_rule("gredy")


def test_a_name_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "RULES", dict(RULES))
    assert register_rule(Greedy) is Greedy  # a module that is imported twice does no harm

    class Usurper(VerificationRule):
        name = "greedy"

    with pytest.raises(ValueError, match="the rule name 'greedy' belongs to Greedy; choose another"):
        register_rule(Usurper)


@pytest.mark.parametrize("rule", [Greedy(), SampleAndMatch()])
def test_shapes_that_do_not_belong_together(rule: VerificationRule) -> None:
    nodes = torch.zeros(2, 3, dtype=torch.int64)
    sampling = SamplingBatch.from_params([None, None])
    with pytest.raises(ValueError, match=r"logits \[B, N \+ 1, V\].* got \[2, 3, 5\], \[2, 3\], \[2, 3\], \[2, 3\]"):
        rule.verify(torch.zeros(2, 3, 5), nodes, nodes, nodes.bool(), nodes[:, 0], sampling)


# ---------------------------------------------------------------------------------------------------------------------
# Greedy
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [5, 1000, 49152])
def test_argmax_takes_the_lowest_id_in_every_layout(dtype: torch.dtype, vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    values = torch.randint(0, 3, (2, 4, vocab_size), generator=generator).to(dtype)
    expected = [[row.index(max(row)) for row in slot] for slot in values.tolist()]
    strided = torch.stack([values, values], -1)[..., 0]
    transposed = values.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in (values, strided, transposed):
        assert layout.argmax(-1).tolist() == expected
    flat = torch.zeros(1, 1, dtype=dtype).expand(4, vocab_size)
    assert flat.argmax(-1).tolist() == [0] * 4


def test_greedy_by_hand() -> None:
    # Root -> 1, then after node 1 (token 1) -> 0, after node 2 (token 0) a tie of 1 and 2 -> 1.
    logits = torch.tensor([[[0, 5, 0], [9, 0, 0], [3, 2, 1], [0, 4, 4]]]).float()
    tokens, parents = torch.tensor([[0, 1, 0]]), torch.tensor([[-1, -1, 1]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    verdict = Greedy().verify(logits, tokens, parents, valid, torch.tensor([0]), SamplingBatch.from_params([None]))
    assert verdict.accepted.tolist() == [[False, True, True]] and verdict.bonus_token.tolist() == [1]
    p = logits.softmax(-1)
    assert Greedy().acceptance(p, None, tokens, parents, valid).tolist() == [[0.0, 1.0, 1.0]]


def test_acceptance_by_hand_and_at_invalid_nodes() -> None:
    p = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]]])
    tokens, parents = torch.tensor([[0, 1, -7]]), torch.tensor([[-1, 0, 99]])
    valid = torch.tensor([[True, True, False]])
    assert SampleAndMatch().acceptance(p, None, tokens, parents, valid).tolist() == [[0.5, 0.75, 0.0]]
    assert Greedy().acceptance(p, None, tokens, parents, valid).tolist() == [[1.0, 1.0, 0.0]]


# ---------------------------------------------------------------------------------------------------------------------
# The exact law
# ---------------------------------------------------------------------------------------------------------------------

VOCAB, SIDES = 3, 4
# A token depends on the two before it. Probabilities are quarters, so one fair coin of four sides draws a token.
QUARTERS = torch.tensor(
    [
        [[1, 1, 2], [2, 1, 1], [0, 3, 1]],
        [[1, 2, 1], [3, 0, 1], [1, 1, 2]],
        [[2, 2, 0], [1, 1, 2], [4, 0, 0]],
    ]
)
DRAW = torch.stack([torch.arange(VOCAB).repeat_interleave(row) for row in QUARTERS.view(-1, VOCAB)])
DRAW = DRAW.view(VOCAB, VOCAB, SIDES)
PROMPT = (0, 0)


def contexts(prompt: Tensor, tokens: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    """The two tokens before the choice at every column, each `[R, N + 1]`. `prompt` is `[R, 2]`."""
    last = torch.cat([prompt[:, 1:], tokens], 1)
    return torch.cat([prompt[:, :1], last.gather(1, parents + 1)], 1), last


class Round:
    """One round of the toy target on R rows: a tree, and the coins of every position. Spare coins are for mutants."""

    def __init__(
        self, prompt: Tensor, tokens: Tensor, parents: Tensor, positions: Tensor, coins: Tensor, spare: Tensor
    ):
        self.tokens, self.parents, self.positions = tokens, parents, positions
        self.valid = valid_nodes(tokens, parents, torch.ones_like(tokens, dtype=torch.bool), VOCAB)
        self.before, self.last = contexts(prompt, tokens, parents)
        self.coins, self.spare = coins, spare
        self.rows = torch.arange(len(tokens))

    def choose(self, slots: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
        """Inverse CDF of the coin of the position; the text starts at position 1."""
        coin = self.coins[slots, (positions - 1) % self.coins.shape[1]]
        return DRAW[self.before[slots, columns], self.last[slots, columns], coin]

    def choose_at(self, columns: Tensor, depth: Tensor | int) -> Tensor:
        return self.choose(self.rows, columns, self.positions + depth + 1)

    def all_choices(self) -> Tensor:
        depth = torch.cat([torch.zeros_like(self.rows)[:, None], depths(self.parents)], 1)
        return torch.stack([self.choose_at(self.rows * 0 + c, depth[:, c]) for c in range(depth.shape[1])], 1)


Verify = Callable[[Round], Verdict]


def deliver(verify: Verify, tokens: Tensor, parents: Tensor, coins: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Verify one tree a row, then go on with empty trees. Returns text, `[R, H]`, and nodes accepted, `[R, N]`."""
    rows, horizon = coins.shape
    text = torch.zeros(rows, 2 + horizon + tokens.shape[1] + 1, dtype=torch.int64)
    text[:, 0], text[:, 1] = PROMPT
    done = torch.zeros(rows, dtype=torch.int64)
    of_the_tree = torch.zeros_like(tokens, dtype=torch.bool)
    while bool((done < horizon).any()):
        prompt = text.gather(1, done[:, None] + torch.arange(2))
        verdict = verify(Round(prompt, tokens, parents, done, coins, spare))
        path, length = accepted_path(verdict.accepted)
        new = torch.cat([tokens.gather(1, path.clamp(min=0)), verdict.bonus_token[:, None]], 1)
        new.scatter_(1, length[:, None], verdict.bonus_token[:, None])
        text.scatter_(1, 2 + done[:, None] + torch.arange(new.shape[1]), new)
        done = (done + length + 1).clamp(max=horizon)
        if tokens.shape[1]:
            of_the_tree = verdict.accepted
        tokens = parents = tokens[:, :0]
    return text[:, 2 : 2 + horizon], of_the_tree


def every_tree(num_nodes: int, horizon: int) -> tuple[Tensor, Tensor]:
    """All trees of that many nodes, repeated siblings included, that cannot deliver beyond the horizon."""
    parents = torch.tensor(list(product(*(range(-1, i) for i in range(num_nodes)))), dtype=torch.int64)
    parents = parents[(depths(parents) < horizon).all(1)]
    tokens = torch.tensor(list(product(range(VOCAB), repeat=num_nodes)), dtype=torch.int64)
    return tokens.repeat(len(parents), 1), parents.repeat_interleave(len(tokens), 0)


def every_outcome(num_nodes: int, horizon: int, spare: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, parents, coins and tree number of every pair of a tree and an outcome of `horizon + spare` coins."""
    tokens, parents = every_tree(num_nodes, horizon)
    coins = torch.tensor(list(product(range(SIDES), repeat=horizon + spare)), dtype=torch.int64)
    tree = torch.arange(len(tokens)).repeat_interleave(len(coins))
    return tokens[tree], parents[tree], coins.repeat(len(tokens), 1), tree


def target_law(horizon: int) -> dict[tuple[int, ...], Fraction]:
    """The probability of every text under the toy target."""
    law = {}
    for text in product(range(VOCAB), repeat=horizon):
        before, last, chance = *PROMPT, Fraction(1)
        for token in text:
            chance *= Fraction(int(QUARTERS[before, last, token]), SIDES)
            before, last = last, token
        law[text] = chance
    return law


def law_is_exact(text: Tensor, tree: Tensor) -> bool:
    """Whether, given any tree, the texts over the equally likely outcomes follow the target's law exactly."""
    horizon = text.shape[1]
    digits = VOCAB ** torch.arange(horizon - 1, -1, -1)
    trees = int(tree.max()) + 1
    counts = (tree * VOCAB**horizon + (text * digits).sum(1)).bincount(minlength=trees * VOCAB**horizon)
    outcomes = tree.bincount(minlength=trees)
    law = list(target_law(horizon).values())
    assert sum(law) == 1
    denominator = SIDES**horizon
    chances = torch.tensor([int(chance * denominator) for chance in law])
    return torch.equal(counts.view(trees, -1) * denominator, outcomes[:, None] * chances)


def rule_is_lossless(verify: Verify, num_nodes: int, horizon: int, spare: int = 0) -> bool:
    tokens, parents, coins, tree = every_outcome(num_nodes, horizon, spare)
    text, _ = deliver(verify, tokens, parents, coins[:, :horizon], coins[:, horizon:])
    return law_is_exact(text, tree)


def by_descending(r: Round) -> Verdict:
    return descend(r.choose, r.tokens, r.parents, r.valid, r.positions)


def by_settling_all(r: Round) -> Verdict:
    return settle(r.all_choices(), r.tokens, r.parents, r.valid)


@pytest.mark.parametrize("verify", [by_descending, by_settling_all])
@pytest.mark.parametrize(("num_nodes", "horizon"), [(0, 3), (1, 3), (2, 4), (3, 4)])
def test_the_walk_is_lossless_exactly(verify: Verify, num_nodes: int, horizon: int) -> None:
    assert rule_is_lossless(verify, num_nodes, horizon)


def test_the_walk_is_lossless_exactly_on_all_trees_of_four_nodes() -> None:
    assert rule_is_lossless(by_descending, num_nodes=4, horizon=4)


def test_acceptance_is_the_exact_probability_given_the_tree() -> None:
    tokens, parents, coins, tree = every_outcome(num_nodes=3, horizon=4)
    _, accepted = deliver(by_descending, tokens, parents, coins, coins[:, :0])
    drawn = torch.stack([accepted[tree == t].double().mean(0) for t in range(int(tree.max()) + 1)])
    tokens, parents = every_tree(num_nodes=3, horizon=4)
    r = Round(torch.tensor([PROMPT]).expand(len(tokens), 2), tokens, parents, tokens[:, 0] * 0, coins, coins)
    p = QUARTERS[r.before, r.last].double() / SIDES
    conditional = SampleAndMatch().acceptance(p, None, tokens, parents, r.valid)
    along_path = conditional.clone()
    for node in range(3):
        above = parents[:, node]
        along_path[:, node] *= torch.where(above >= 0, along_path.gather(1, above.clamp(min=0)[:, None])[:, 0], 1.0)
    # Dyadic numbers: float64 holds both sides exactly.
    assert torch.equal(drawn, along_path)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong rules, which the same check has to reject
# ---------------------------------------------------------------------------------------------------------------------


def coin_per_sibling(r: Round) -> Verdict:
    """Each child is accepted on a coin of its own; if none is, the bonus is drawn as if nothing had been refused."""
    accepted, column = torch.zeros_like(r.valid), torch.zeros_like(r.rows)
    for node in range(r.tokens.shape[1]):
        chance = QUARTERS[r.before[:, 0], r.last[:, 0], r.tokens[:, node]]
        take = r.valid[:, node] & (r.parents[:, node] == -1) & (column == 0) & (r.spare[:, node] < chance)
        accepted[:, node], column = take, torch.where(take, node + 1, column)
    return Verdict(accepted, r.choose_at(column, (column > 0).long()))


def any_child(r: Round) -> Verdict:
    """The first child of the root is accepted, whatever it carries."""
    children = r.valid & (r.parents == -1)
    accepted = children & (children.cumsum(1) == 1)
    column = last_accepted(accepted)
    return Verdict(accepted, r.choose_at(column, (column > 0).long()))


def bonus_at_the_parent(r: Round) -> Verdict:
    accepted, _ = by_settling_all(r)
    column = last_accepted(accepted)
    parent = torch.cat([r.rows[:, None] * 0, r.parents + 1], 1).gather(1, column[:, None])
    return Verdict(accepted, r.all_choices().gather(1, parent)[:, 0])


def ancestors_ignored(r: Round) -> Verdict:
    choices = r.all_choices()
    accepted = r.valid & (choices.gather(1, r.parents + 1) == r.tokens)
    return Verdict(accepted, choices.gather(1, last_accepted(accepted)[:, None])[:, 0])


def noise_of_the_next_position(r: Round) -> Verdict:
    """Right at the root and one too far below it."""

    def choose(slots: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
        return r.choose(slots, columns, positions + (columns > 0))

    return descend(choose, r.tokens, r.parents, r.valid, r.positions)


def noise_reused_down_the_tree(r: Round) -> Verdict:
    def choose(slots: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
        return r.choose(slots, columns, r.positions[slots] + 1)

    return descend(choose, r.tokens, r.parents, r.valid, r.positions)


def bonus_drawn_again(r: Round) -> Verdict:
    """Where the root's sample has no child it is thrown away, and the bonus drawn with a fresh coin."""
    accepted, bonus = by_descending(r)
    again = DRAW[r.before[:, 0], r.last[:, 0], r.spare[:, 0]]
    return Verdict(accepted, torch.where(accepted.any(1) | ~r.valid.any(1), bonus, again))


def greedy_bonus(r: Round) -> Verdict:
    accepted, _ = by_descending(r)
    column = last_accepted(accepted)
    best = QUARTERS[r.before[r.rows, column], r.last[r.rows, column]].argmax(-1)
    return Verdict(accepted, best)


def repeated_siblings_trusted(r: Round) -> Verdict:
    return descend(r.choose, r.tokens, r.parents, torch.ones_like(r.valid), r.positions)


@pytest.mark.parametrize(
    ("mutant", "num_nodes", "horizon", "spare"),
    [
        (coin_per_sibling, 2, 3, 2),
        (any_child, 1, 3, 0),
        (bonus_at_the_parent, 1, 3, 0),
        (ancestors_ignored, 2, 4, 0),
        (noise_of_the_next_position, 1, 3, 0),
        (noise_reused_down_the_tree, 1, 3, 0),
        (bonus_drawn_again, 1, 3, 1),
        (greedy_bonus, 1, 3, 0),
        (repeated_siblings_trusted, 2, 3, 0),
    ],
)
def test_the_exact_check_rejects(mutant: Verify, num_nodes: int, horizon: int, spare: int) -> None:
    def in_the_first_round(r: Round) -> Verdict:
        return mutant(r) if r.tokens.shape[1] else by_descending(r)

    assert rule_is_lossless(by_descending, num_nodes, horizon, spare)
    assert not rule_is_lossless(in_the_first_round, num_nodes, horizon, spare)


def test_fresh_noise_at_every_node_keeps_the_law() -> None:
    """The exact check asks for the law, not for the coupling with plain sampling: other coins pass it."""

    def noise_per_node(r: Round) -> Verdict:
        def choose(slots: Tensor, columns: Tensor, positions: Tensor) -> Tensor:
            own = DRAW[r.before[slots, columns], r.last[slots, columns], r.spare[slots, (columns - 1).clamp(min=0)]]
            return torch.where(columns > 0, own, r.choose(slots, columns, positions))

        return descend(choose, r.tokens, r.parents, r.valid, r.positions)

    assert rule_is_lossless(noise_per_node, num_nodes=2, horizon=3, spare=2)


def test_a_drafter_that_sees_the_noise_is_caught() -> None:
    """It leaves the text alone, on average over its trees, but not given the tree, nor the acceptance.

    What is recorded with the tree, and every estimate that divides by its probability, would be wrong.
    """
    _, _, coins, _ = every_outcome(num_nodes=0, horizon=3)
    tokens = DRAW[PROMPT[0], PROMPT[1], coins[:, :1]]  # the very token that will be drawn
    text, accepted = deliver(by_descending, tokens, torch.full_like(tokens, -1), coins, coins[:, :0])
    assert law_is_exact(text, torch.zeros_like(tokens[:, 0]))
    assert not law_is_exact(text, tokens[:, 0])
    assert accepted.all()  # where `acceptance` says one half at most
    # A drafter that looks at a coin of its own has the same trees and passes.
    tokens, parents, coins, _ = every_outcome(num_nodes=0, horizon=3, spare=1)
    tokens = DRAW[PROMPT[0], PROMPT[1], coins[:, 3:]]
    text, _ = deliver(by_descending, tokens, torch.full_like(tokens, -1), coins[:, :3], coins[:, :0])
    assert law_is_exact(text, tokens[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Token by token
# ---------------------------------------------------------------------------------------------------------------------

WORDS, LENGTH, FIRST = 6, 16, 1000
TABLE = torch.randn(WORDS, WORDS, WORDS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
PARAMS = [
    SamplingParams(temperature, top_k, top_p, seed)
    for seed, (temperature, top_k, top_p) in enumerate(product([0.0, 0.6, 1.0, 1.7], [0, 1, 3], [1.0, 0.9, 0.5]))
]


def plain_text(params: SamplingParams) -> list[int]:
    """One token at a time, from the definition."""
    text = [0, 1]
    for position in range(FIRST + 1, FIRST + 1 + LENGTH):
        scores = TABLE[text[-2], text[-1]]
        if params.temperature > 0:
            scores = warp_logits(scores, params.temperature, params.top_k, params.top_p)
            scores = scores + gumbel(torch.tensor(params.seed), torch.tensor(position), WORDS)
        text.append(int(scores.argmax()))
    return text[2:]


def speculative_text(rule: VerificationRule, num_nodes: int) -> tuple[list[list[int]], int]:
    """Random trees, with broken nodes among them, over all requests in one batch. Returns texts and accepted nodes."""
    generator = torch.Generator().manual_seed(num_nodes)
    texts, sampling, hits = [[0, 1] for _ in PARAMS], SamplingBatch.from_params(PARAMS), 0
    while min(map(len, texts)) < 2 + LENGTH:
        shape = (len(PARAMS), num_nodes)
        tokens = torch.randint(-1, WORDS + 1, shape, generator=generator)
        parents = torch.stack([torch.randint(-2, i + 1, shape[:1], generator=generator) for i in range(num_nodes)], 1)
        valid = valid_nodes(tokens, parents, torch.rand(shape, generator=generator) < 0.95, WORDS)
        # Only valid nodes have a context; elsewhere any logits will do.
        tokens_in, parents_in = tokens.clamp(0, WORDS - 1), torch.where(valid, parents, -1)
        before, last = contexts(torch.tensor([text[-2:] for text in texts]), tokens_in, parents_in)
        positions = torch.tensor([FIRST + len(text) - 2 for text in texts])
        verdict = rule.verify(TABLE[before, last], tokens, parents, valid, positions, sampling)
        path, length = accepted_path(verdict.accepted)
        hits += int(length.sum())
        for b, text in enumerate(texts):
            text.extend(tokens[b, path[b, : length[b]]].tolist() + [verdict.bonus_token[b].item()])
    return [text[2 : 2 + LENGTH] for text in texts], hits


@pytest.fixture(scope="module")
def plain_texts() -> list[list[int]]:
    return [plain_text(params) for params in PARAMS]


@pytest.mark.parametrize("num_nodes", [1, 4, 9])
def test_speculative_text_is_plain_text(plain_texts: list[list[int]], num_nodes: int) -> None:
    texts, hits = speculative_text(SampleAndMatch(), num_nodes)
    assert texts == plain_texts
    assert hits > 10  # the trees did take part


def test_greedy_rule_and_greedy_requests_agree(plain_texts: list[list[int]]) -> None:
    texts, _ = speculative_text(Greedy(), 5)
    greedy = [params.temperature == 0 for params in PARAMS]
    assert sum(greedy) == 9
    assert [t for t, g in zip(texts, greedy, strict=True) if g] == [
        t for t, g in zip(plain_texts, greedy, strict=True) if g
    ]


def test_the_seed_decides_the_text() -> None:
    texts = {tuple(plain_text(SamplingParams(temperature=1.0, seed=seed))) for seed in range(20)}
    assert len(texts) == 20


def relative_positions(descend: Callable) -> Callable:
    return lambda choose, tokens, parents, valid, positions: descend(choose, tokens, parents, valid, positions * 0)


def next_position(descend: Callable) -> Callable:
    return lambda choose, tokens, parents, valid, positions: descend(choose, tokens, parents, valid, positions + 1)


def same_position(gumbel: Callable) -> Callable:
    return lambda seed, position, vocab_size: gumbel(seed, position * 0 + FIRST + 1, vocab_size)


def fresh_noise(gumbel: Callable) -> Callable:
    return lambda seed, position, vocab_size: gumbel(torch.randint_like(seed, 2**62), position, vocab_size)


def seed_of_the_slot(gumbel: Callable) -> Callable:
    return lambda seed, position, vocab_size: gumbel(torch.arange(len(seed)), position, vocab_size)


def ancestors_skipped(walk: Callable) -> Callable:
    return lambda tokens, parents, valid, choices: walk(tokens, parents.clamp(max=-1), valid, choices)


def shallowest(last_accepted: Callable) -> Callable:
    return lambda accepted: last_accepted(accepted) - accepted.any(1).long()


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("descend", relative_positions),
        ("descend", next_position),
        ("gumbel", same_position),
        ("gumbel", fresh_noise),
        ("gumbel", seed_of_the_slot),
        ("walk", ancestors_skipped),
        ("last_accepted", shallowest),
    ],
)
def test_the_comparison_with_plain_text_rejects(
    monkeypatch: pytest.MonkeyPatch, plain_texts: list[list[int]], name: str, mutate: Callable
) -> None:
    monkeypatch.setattr(verification, name, mutate(getattr(verification, name)))
    texts, _ = speculative_text(SampleAndMatch(), 4)
    assert texts != plain_texts

"""Block verification: a rational reference is lossless exactly and accepts no less than rejection; the tensors agree.

The reference is the algorithm as the paper states it, chain by chain, with the probability of every end. Summed over
all draws it gives the target's law to the last digit. The tensor form is fed coins just below and just above every
threshold of the reference. Wrong rules fail one check or the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product

import pytest
import torch
from fraction_laws import VOCAB, Law, laws, scaled
from torch import Tensor

from aurora_kernels.noise import uniform
from aurora_rl.envs import SamplingParams, get_rule
from aurora_rl.envs.verification import block
from aurora_rl.envs.verification.block import Block, verify_chain
from aurora_rl.envs.verification.rules import Verdict
from aurora_rl.objectives import AcceptanceRewardLoss, ExpectedLengthLoss, make_objectives
from aurora_rl.sampling_params import SamplingBatch
from aurora_rl.testing import tiny_batch
from aurora_rl.testing.enumerable_worlds import (
    DrawnTree,
    EnumerableDrafter,
    EnumerableTarget,
    tree_trajectory,
)
from aurora_rl.trajectories import pack

DEEPEST = 3
Text = tuple[int, ...]

# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------


class World:
    """Target and drafter: a law after each text of up to three tokens. ``alike``: they agree on every other text."""

    def __init__(self, seed: int, alike: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        texts = [text for length in range(DEEPEST + 1) for text in product(range(VOCAB), repeat=length)]
        self.p = {text: laws(generator) for text in texts}
        self.q = {text: laws(generator) for text in texts}
        if alike:
            self.q.update({text: self.p[text] for text in texts[::2]})


WORLDS = [World(seed, alike) for seed in range(6) for alike in (False, True)]
Ends = Callable[[Text], bool]  # whether nothing is drafted after a text


def always_to(depth: int) -> Ends:
    return lambda text: len(text) == depth


def after_a_two(text: Text) -> bool:
    """The chain ends by what was drafted: a drafter may stop where it is unsure."""
    return len(text) == DEEPEST or text[-1:] == (2,)


def drawn_chains(world: World, ends: Ends, text: Text = ()) -> Iterator[tuple[Text, Fraction]]:
    """Every chain that the drafter can draw, with its probability."""
    if ends(text):
        yield text, Fraction(1)
        return
    for token, chance in enumerate(world.q[text]):
        if chance:
            yield from ((chain, chance * rest) for chain, rest in drawn_chains(world, ends, (*text, token)))


def prefix_weights(world: World, chain: Text) -> list[Fraction]:
    """The ``p_i`` of the paper's algorithm 2."""
    weights = [Fraction(1)]
    for i, token in enumerate(chain):
        ratio = world.p[chain[:i]][token] / world.q[chain[:i]][token]
        weights.append(min(Fraction(1), weights[-1] * ratio))
    return weights


def thresholds(world: World, chain: Text) -> list[tuple[Fraction, Law]]:
    """The chance ``h_i`` of every node's coin, that of the root being 1, and the law of the bonus token there."""
    found = []
    for i, weight in enumerate(prefix_weights(world, chain)):
        p, q = world.p[chain[:i]], world.q[chain[:i]]
        if i == len(chain):
            found.append((weight if i else Fraction(1), p))
            continue
        left = [max(weight * a - b, Fraction(0)) for a, b in zip(p, q, strict=True)]
        above = sum(left)
        lands = above / (above + 1 - weight) if above else Fraction(0)
        found.append((lands if i else Fraction(1), scaled(left)))
    return found


def ends_of(world: World, chain: Text) -> list[Fraction]:
    """The probability that so many nodes are accepted, given the chain."""
    chances, later = [], Fraction(1)
    for lands, _ in reversed(thresholds(world, chain)):
        chances.append(later * lands)
        later *= 1 - lands
    return chances[::-1]


def extend(world: World, law: dict[Text, Fraction], text: Text, chance: Fraction) -> None:
    """Continue by plain sampling."""
    if len(text) == DEEPEST + 1 or not chance:
        law[text] += chance
        return
    for token, share in enumerate(world.p[text]):
        extend(world, law, (*text, token), chance * share)


def plain(world: World) -> dict[Text, Fraction]:
    law: dict[Text, Fraction] = defaultdict(Fraction)
    extend(world, law, (), Fraction(1))
    return {text: chance for text, chance in law.items() if chance}


def delivered(
    world: World, ends: Ends, rule: Callable[[World, Text], list[tuple[Fraction, Law]]]
) -> dict[Text, Fraction]:
    """Law of the first four tokens: a round, and plain sampling after it."""
    law: dict[Text, Fraction] = defaultdict(Fraction)
    for chain, drawn in drawn_chains(world, ends):
        for accepted, (chance, bonus) in enumerate(rule(world, chain)):
            for token, share in enumerate(bonus):
                extend(world, law, (*chain[:accepted], token), drawn * chance * share)
    return {text: chance for text, chance in law.items() if chance}


def by_block(world: World, chain: Text) -> list[tuple[Fraction, Law]]:
    bonus = [law for _, law in thresholds(world, chain)]
    return list(zip(ends_of(world, chain), bonus, strict=True))


ENDS = {**{str(depth): always_to(depth) for depth in range(DEEPEST + 1)}, "by what was drafted": after_a_two}
every_end = pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)


@every_end
def test_the_reference_is_lossless_exactly(ends: Ends) -> None:
    for world in WORLDS:
        assert delivered(world, ends, by_block) == plain(world)


def stops_at_the_first_failure(world: World, chain: Text) -> list[tuple[Fraction, Law]]:
    """Wrong: as token-wise rules do."""
    found, arrived, all_of = [], Fraction(1), thresholds(world, chain)
    for i, (_, bonus) in enumerate(all_of):
        goes_on = all_of[i + 1][0] if i < len(chain) else Fraction(0)
        found.append((arrived * (1 - goes_on), bonus))
        arrived *= goes_on
    return found


def bonus_without_the_prefix(world: World, chain: Text) -> list[tuple[Fraction, Law]]:
    """Wrong: the residual of token-wise rejection."""
    found = []
    for i, (chance, bonus) in enumerate(by_block(world, chain)):
        left = [max(a - b, Fraction(0)) for a, b in zip(world.p[chain[:i]], world.q[chain[:i]], strict=True)]
        found.append((chance, scaled(left) if i < len(chain) and sum(left) else bonus))
    return found


@pytest.mark.parametrize("rule", [stops_at_the_first_failure, bonus_without_the_prefix])
def test_wrong_rules_have_another_law(rule: Callable[[World, Text], list[tuple[Fraction, Law]]]) -> None:
    assert any(delivered(world, always_to(2), rule) != plain(world) for world in WORLDS)


@every_end
def test_a_prefix_is_accepted_by_its_weight_whatever_is_drafted_next(ends: Ends) -> None:
    for world in WORLDS:
        reached: dict[Text, Fraction] = defaultdict(Fraction)
        drawn: dict[Text, Fraction] = defaultdict(Fraction)
        weights = {}
        for chain, chance in drawn_chains(world, ends):
            at = ends_of(world, chain)
            assert sum(at) == 1
            for i, weight in enumerate(prefix_weights(world, chain)):
                reached[chain[:i]] += chance * sum(at[i:])
                drawn[chain[:i]] += chance
                weights[chain[:i]] = weight
        assert {text: reached[text] / drawn[text] for text in drawn} == weights


@every_end
def test_no_less_is_accepted_than_by_token_wise_rejection(ends: Ends) -> None:
    more = 0
    for world in WORLDS:
        by_blocks = by_tokens = Fraction(0)
        for chain, chance in drawn_chains(world, ends):
            by_blocks += chance * sum(i * share for i, share in enumerate(ends_of(world, chain)))
            stands = Fraction(1)
            for i, token in enumerate(chain):
                stands *= min(Fraction(1), world.p[chain[:i]][token] / world.q[chain[:i]][token])
                by_tokens += chance * stands
        assert by_blocks >= by_tokens
        more += by_blocks > by_tokens
    # Chains of one node are judged alike. Of longer ones more is accepted where a node makes up for one before it.
    assert more == 0 if ends in (ENDS["0"], ENDS["1"]) else more >= 3


# ---------------------------------------------------------------------------------------------------------------------
# The tensors against it
# ---------------------------------------------------------------------------------------------------------------------

Settle = Callable[..., Verdict]


def agrees(candidate: Settle, ends: Ends, padding: int = 0) -> bool:
    """Whether every chain ends where the reference does at coins around every threshold, with the same residual."""
    for world in WORLDS:
        cases: list[tuple[Text, Tensor, int, Law]] = []
        for chain, _ in drawn_chains(world, ends):
            found = thresholds(world, chain)
            for end, (_, bonus) in enumerate(found):
                coins = torch.full((DEEPEST + padding,), 0.5, dtype=torch.float64)
                for node, (lands, _) in enumerate(found[1:]):
                    coins[node] = float(lands) + (1e-9 if node >= end else -1e-9)
                # Such coins exist only if the chain can end there.
                if ends_of(world, chain)[end]:
                    cases.append((chain, coins, end, bonus))
        count, size = len(cases), DEEPEST + padding
        p, q = (
            torch.rand(count, size + 1, VOCAB, dtype=torch.float64),
            torch.rand(count, size, VOCAB, dtype=torch.float64),
        )
        tokens, valid = torch.randint(VOCAB, (count, size)), torch.zeros(count, size, dtype=torch.bool)
        parents = torch.arange(-1, size - 1).repeat(count, 1)
        for row, (chain, _, _, _) in enumerate(cases):
            for i in range(len(chain) + 1):
                p[row, i] = torch.tensor([float(v) for v in world.p[chain[:i]]], dtype=torch.float64)
            for i, token in enumerate(chain):
                q[row, i] = torch.tensor([float(v) for v in world.q[chain[:i]]], dtype=torch.float64)
                tokens[row, i], valid[row, i] = token, True
        seen: list[tuple[Tensor, Tensor]] = []

        def pick(residual: Tensor, column: Tensor, seen: list = seen) -> Tensor:
            seen.append((residual, column))
            return residual.argmax(-1)

        coins = torch.stack([each for _, each, _, _ in cases])
        verdict = candidate(p, q, tokens, parents, valid, coins, pick)
        (residual, column), *_ = seen
        expected = torch.tensor([[float(v) for v in bonus] for *_, bonus in cases], dtype=torch.float64)
        wanted = torch.tensor([end for _, _, end, _ in cases])
        accepted = torch.arange(size) < wanted[:, None]
        if not torch.equal(verdict.accepted, accepted) or not torch.equal(column, wanted):
            return False
        if not torch.allclose(residual, expected, atol=1e-12):
            return False
    return True


@every_end
def test_the_tensors_decide_as_the_reference_at_every_threshold(ends: Ends) -> None:
    assert agrees(verify_chain, ends)
    assert agrees(verify_chain, ends, padding=2)


def mutant_one_coin(p, q, tokens, parents, valid, coins, pick) -> Verdict:
    return verify_chain(p, q, tokens, parents, valid, coins[:, :1].expand_as(coins), pick)


def mutant_own_law(p, q, tokens, parents, valid, coins, pick) -> Verdict:
    return verify_chain(p, p[:, 1:], tokens, parents, valid, coins, pick)


def mutant_bonus_from_p(p, q, tokens, parents, valid, coins, pick) -> Verdict:
    return verify_chain(p, q, tokens, parents, valid, coins, lambda _, at: pick(p[torch.arange(len(p)), at], at))


def mutant_shorter(p, q, tokens, parents, valid, coins, pick) -> Verdict:
    valid = valid.clone()
    valid[:, -1] = False
    return verify_chain(p, q, tokens, parents, valid, coins, pick)


@pytest.mark.parametrize("mutant", [mutant_one_coin, mutant_own_law, mutant_bonus_from_p, mutant_shorter])
def test_wrong_tensors_are_caught(mutant: Settle) -> None:
    assert not agrees(mutant, always_to(3))


def test_a_node_that_the_drafter_cannot_have_drawn_ends_the_chain() -> None:
    p = torch.tensor([[[0.5, 0.5]] * 3])
    q = torch.tensor([[[0.0, 1.0], [0.5, 0.5]]])
    parts = torch.tensor([[0, 1]]), torch.tensor([[-1, 0]]), torch.ones(1, 2, dtype=torch.bool)
    verdict = verify_chain(p, q, *parts, torch.full((1, 2), 0.01), lambda residual, _: (residual / p[:, 0]).argmin(-1))
    assert not verdict.accepted.any() and torch.equal(verdict.bonus_token, torch.tensor([0]))


def test_equal_distributions_accept_all_and_rounding_leaves_the_law() -> None:
    p = torch.tensor([[[0.0, 0.5, 0.5]] * 3])
    parts = torch.tensor([[1, 2]]), torch.tensor([[-1, 0]]), torch.ones(1, 2, dtype=torch.bool)
    seen: list[Tensor] = []

    def pick(residual: Tensor, column: Tensor) -> Tensor:
        seen.append(residual)
        return residual.argmax(-1)

    assert verify_chain(p, p[:, :2], *parts, torch.full((1, 2), 0.999), pick).accepted.all()
    # A coin of 1, to which a number just below it may round, lands nowhere.
    assert not verify_chain(p, p[:, :2], *parts, torch.ones(1, 2), pick).accepted.any()
    torch.testing.assert_close(seen, [p[:, 0], p[:, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# With its noise
# ---------------------------------------------------------------------------------------------------------------------

P = torch.tensor([[0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.5, 0.2, 0.3]], dtype=torch.float64)  # by the last token
Q = torch.tensor([[0.9, 0.05, 0.05], [0.8, 0.1, 0.1], [0.9, 0.05, 0.05]], dtype=torch.float64)
LENGTH = 4


def served_texts(count: int) -> Tensor:
    """Counts of the first four tokens of many requests, each served in rounds of chains of two."""
    generator, slots = torch.Generator().manual_seed(0), torch.arange(count)
    sampling = SamplingBatch.from_params([SamplingParams(1.0, seed=seed) for seed in range(count)])
    text, length = torch.zeros(count, LENGTH + 4, dtype=torch.int64), torch.ones(count, dtype=torch.int64)
    parents = torch.tensor([[-1, 0]]).expand(count, 2)
    while int(length.min()) <= LENGTH:
        root = text[slots, length - 1]
        tokens, last = [], root
        for _ in range(2):
            tokens.append(last := Q[last].multinomial(1, generator=generator)[:, 0])
        chain = torch.stack(tokens, 1)
        before = torch.cat([root[:, None], chain], 1)
        verdict = Block().verify(
            P[before].log(), chain, parents, torch.ones_like(chain).bool(), length - 1, sampling, Q[before[:, :-1]]
        )
        accepted = verdict.accepted.sum(1)
        for step in range(3):
            new = chain[:, step] if step < 2 else verdict.bonus_token
            new = torch.where(accepted == step, verdict.bonus_token, new)
            here = (length + step < text.shape[1]) & (step <= accepted)
            text[slots[here], (length + step)[here]] = new[here]
        length = (length + accepted + 1).clamp(max=LENGTH + 1)
    place = VOCAB ** torch.arange(LENGTH)
    return (text[:, 1 : LENGTH + 1] * place).sum(1).bincount(minlength=VOCAB**LENGTH)


def statistic(counts: Tensor) -> float:
    """Chi-square against the target's law, of 80 degrees of freedom."""
    law = torch.zeros(VOCAB**LENGTH, dtype=torch.float64)
    for text in product(range(VOCAB), repeat=LENGTH):
        place = sum(token * VOCAB**i for i, token in enumerate(text))
        law[place] = torch.stack([P[a, b] for a, b in zip((0, *text), text, strict=False)]).prod()
    expected = law * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def test_the_text_of_several_rounds_has_the_targets_law(monkeypatch: pytest.MonkeyPatch) -> None:
    assert statistic(served_texts(10_000)) < 140  # of 80 degrees of freedom one in 20 000 is above

    def coins_of_a_position(seed: Tensor, root: Tensor, depth: Tensor, stream: int) -> Tensor:
        return uniform(seed, root + depth, torch.zeros_like(depth), stream)

    # Wrong: a round after a rejection would flip the coins again that are known to have failed.
    monkeypatch.setattr(block, "uniform", coins_of_a_position)
    assert statistic(served_texts(10_000)) > 300


def test_without_nodes_verification_is_plain_sampling() -> None:
    logits, nodes = torch.randn(50, 1, 7), torch.zeros(50, 0, dtype=torch.int64)
    sampling = SamplingBatch.from_params([SamplingParams(0.8, 5, 0.9, seed) for seed in range(50)])
    round_ = (logits, nodes, nodes, nodes.bool(), torch.full((50,), 9), sampling)
    expected = get_rule("sample_and_match")().verify(*round_)
    assert torch.equal(Block().verify(*round_, torch.zeros(50, 0, 7)).bonus_token, expected.bonus_token)


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------


def test_trees_and_missing_distributions_are_refused() -> None:
    nodes, sampling = torch.zeros(1, 2, dtype=torch.int64), SamplingBatch.from_params([None])
    logits, valid, q = torch.zeros(1, 3, 5), torch.ones(1, 2, dtype=torch.bool), torch.full((1, 2, 5), 0.2)
    with pytest.raises(ValueError, match=r"'block' needs q \[B, N, V\], got None"):
        Block().verify(logits, nodes, nodes - 1, valid, nodes[:, 0], sampling)
    with pytest.raises(
        ValueError, match="'block' verifies chains, and in slot 0 nodes 0 and 1 are both below the root; draft chains"
    ):
        Block().verify(logits, nodes, nodes - 1, valid, nodes[:, 0], sampling, q)
    valid[0, 1] = False  # what is padding is no sibling
    Block().verify(logits, nodes, nodes - 1, valid, nodes[:, 0], sampling, q)


def test_objectives_on_the_acceptance_of_nodes_refuse_it_by_name() -> None:
    message = "'{}' learns by the chance that single nodes are accepted, and the rule 'block' accepts prefixes"
    drafter, head, _ = tiny_batch()
    with pytest.raises(ValueError, match=message.format("expected_length")):
        make_objectives([{"name": "expected_length", "rule": "block"}], drafter, head)
    table, target = EnumerableDrafter(0), EnumerableTarget(0)
    batch = pack([tree_trajectory(DrawnTree((-1, 0), (0, 1)), target, rule="block")])
    for name, loss in (
        ("expected_length", ExpectedLengthLoss(table, target.head, contexts="trees")),
        ("acceptance_reward", AcceptanceRewardLoss(table, target.head)),
    ):
        with pytest.raises(ValueError, match=message.format(name)):
            loss(batch)
    with pytest.raises(ValueError, match="'block' accepts prefixes: a node's chance depends on the whole path"):
        Block().acceptance(P, Q, torch.tensor([0]), torch.tensor([0]))

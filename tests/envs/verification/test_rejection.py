"""Rejection rules: an independent rational reference is lossless exactly, and the tensors equal it at every threshold.

The reference walks one drawn tree in fractions and splits at every test of a node, so it knows all outcomes of a round
and their probabilities. Summed over all draws they give the target's law to the last digit. The tensor form is then fed
coins just below and just above every threshold of the reference: it has to take and to refuse, and end in the same
place with the same residual. Wrong rules fail one check or the other.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import product

import pytest
import torch
from fraction_laws import VOCAB, Law, laws, scaled
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aurora_rl.envs.verification.rejection import Rejection, RejectionWithoutReplacement, reject
from aurora_rl.envs.verification.rules import Verdict

RULES = {True: Rejection(), False: RejectionWithoutReplacement()}
both = pytest.mark.parametrize("replacement", [True, False], ids=["with", "without"])

# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------


class World:
    """Target and drafter: a law after each of the texts of up to two tokens."""

    def __init__(self, seed: int, sure: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        texts = [text for length in range(3) for text in product(range(VOCAB), repeat=length)]
        self.p = {text: laws(generator) for text in texts}
        # Without replacement a second child needs a second token that q allows.
        self.q = {text: laws(generator, zeros=not sure) for text in texts}


class Tree:
    """Parents in topological order; texts of its nodes follow from their tokens."""

    def __init__(self, parents: tuple[int, ...], tokens: tuple[int, ...]) -> None:
        self.parents, self.tokens = parents, tokens
        self.texts: list[tuple[int, ...]] = []
        for parent, token in zip(parents, tokens, strict=True):
            self.texts.append((*self.before(parent), token))

    def before(self, parent: int) -> tuple[int, ...]:
        return () if parent < 0 else self.texts[parent]

    def children(self, parent: int) -> list[int]:
        return [i for i, above in enumerate(self.parents) if above == parent]


def drawn_trees(world: World, parents: tuple[int, ...], replacement: bool) -> Iterator[tuple[Tree, Fraction]]:
    """Every tree that the drafter can draw, with its probability."""
    for tokens in product(range(VOCAB), repeat=len(parents)):
        tree, chance = Tree(parents, tokens), Fraction(1)
        for parent in {-1, *parents}:
            q = world.q[tree.before(parent)]
            for child in tree.children(parent):
                chance *= q[tokens[child]]
                if not replacement:
                    q = scaled([Fraction(0) if t == tokens[child] else v for t, v in enumerate(q)])
        if chance:
            yield tree, chance


class Outcome:
    """One way in which a round can go: coins that bring it about, its probability and where it ends."""

    def __init__(self, coins: dict[int, float], chance: Fraction, column: int, residual: Law) -> None:
        self.coins, self.chance, self.column, self.residual = coins, chance, column, residual


def outcomes(world: World, tree: Tree, replacement: bool) -> Iterator[Outcome]:
    """The rule by its definition, splitting at every test."""

    def at(column: int, coins: dict[int, float], chance: Fraction) -> Iterator[Outcome]:
        text = tree.before(column - 1)
        residual, q = world.p[text], world.q[text]
        for child in tree.children(column - 1):
            token = tree.tokens[child]
            if not q[token]:
                continue  # was not drawn from q
            take = min(Fraction(1), residual[token] / q[token])
            if take:
                yield from at(child + 1, {**coins, child: float(take) - 1e-9}, chance * take)
            chance *= 1 - take
            if not chance:
                return
            coins = {**coins, child: float(take) + 1e-9}
            residual = scaled([max(r - v, Fraction(0)) for r, v in zip(residual, q, strict=True)])
            if not replacement:
                q = scaled([Fraction(0) if t == token else v for t, v in enumerate(q)])
        yield Outcome(coins, chance, column, residual)

    return at(0, {}, Fraction(1))


def delivered(world: World, parents: tuple[int, ...], drawn: bool, verified: bool) -> dict[tuple[int, ...], Fraction]:
    """Law of the first three tokens: a round, and plain sampling after it."""
    law: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)
    for tree, chance in drawn_trees(world, parents, drawn):
        for end in outcomes(world, tree, verified):
            for bonus, share in enumerate(end.residual):
                extend(world, law, (*tree.before(end.column - 1), bonus), chance * end.chance * share)
    return {text: chance for text, chance in law.items() if chance}


def extend(world: World, law: dict[tuple[int, ...], Fraction], text: tuple[int, ...], chance: Fraction) -> None:
    if len(text) == 3 or not chance:
        law[text] += chance
        return
    for token, share in enumerate(world.p[text]):
        extend(world, law, (*text, token), chance * share)


def plain(world: World) -> dict[tuple[int, ...], Fraction]:
    law: dict[tuple[int, ...], Fraction] = defaultdict(Fraction)
    extend(world, law, (), Fraction(1))
    return {text: chance for text, chance in law.items() if chance}


# Chains, siblings at the root, siblings below, both.
SHAPES = [(), (-1,), (-1, 0), (-1, -1), (-1, -1, -1), (-1, 0, 0), (-1, -1, 0, 1), (-1, -1, 0, 0)]


@both
@pytest.mark.parametrize("parents", SHAPES, ids=str)
def test_the_reference_is_lossless_exactly(parents: tuple[int, ...], replacement: bool) -> None:
    for seed in range(6):
        world = World(seed, sure=not replacement)
        assert delivered(world, parents, replacement, replacement) == plain(world)


def test_siblings_drawn_without_replacement_break_the_rule_with() -> None:
    worlds = [World(seed, sure=True) for seed in range(6)]
    assert any(delivered(world, (-1, -1), False, True) != plain(world) for world in worlds)


@pytest.mark.parametrize("parents", SHAPES, ids=str)
def test_the_rule_without_replacement_also_takes_independent_siblings(parents: tuple[int, ...]) -> None:
    # It passes over repeats, and what is left are draws without replacement, of a number that says nothing of them.
    for world in (World(seed) for seed in range(6)):
        assert delivered(world, parents, True, False) == plain(world)


# ---------------------------------------------------------------------------------------------------------------------
# The tensors against it
# ---------------------------------------------------------------------------------------------------------------------

Reject = Callable[..., Verdict]


def tensors(world: World, tree: Tree) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """p ``[1, N + 1, V]``, q ``[1, N, V]``, tokens and parents ``[1, N]``."""
    p = torch.tensor([[[float(v) for v in world.p[text]] for text in ((), *tree.texts)]], dtype=torch.float64)
    before = [tree.before(parent) for parent in tree.parents]
    q = torch.tensor([[[float(v) for v in world.q[text]] for text in before]], dtype=torch.float64)
    return (
        p,
        q.view(1, len(tree.tokens), VOCAB),
        torch.tensor([tree.tokens]).long(),
        torch.tensor([tree.parents]).long(),
    )


def agrees(candidate: Reject, parents: tuple[int, ...], replacement: bool, drawn: bool | None = None) -> bool:
    """Whether it ends every round where the reference does, with the same residual; ``drawn``: by the other mode."""
    drawn = replacement if drawn is None else drawn
    for seed in range(4):
        world = World(seed, sure=not drawn)
        for tree, _ in drawn_trees(world, parents, drawn):
            p, q, tokens, above = tensors(world, tree)
            for end in outcomes(world, tree, replacement):
                coins = torch.full(tokens.shape, 0.5, dtype=torch.float64)
                for node, coin in end.coins.items():
                    coins[0, node] = coin
                seen: list[tuple[Tensor, Tensor]] = []

                def pick(residual: Tensor, column: Tensor, seen: list = seen) -> Tensor:
                    seen.append((residual, column))
                    return residual.argmax(-1)

                verdict = candidate(
                    p, q, tokens, above, torch.ones_like(tokens, dtype=torch.bool), coins, pick, replacement=replacement
                )
                (residual, column) = seen[0]
                path = set()
                node = end.column - 1
                while node >= 0:
                    path.add(node)
                    node = tree.parents[node]
                expected = torch.tensor([float(v) for v in end.residual], dtype=torch.float64)
                if set(verdict.accepted[0].nonzero().flatten().tolist()) != path or int(column) != end.column:
                    return False
                if not torch.allclose(residual[0], expected, atol=1e-12):
                    return False
    return True


@both
@pytest.mark.parametrize("parents", SHAPES, ids=str)
def test_the_tensors_decide_as_the_reference_at_every_threshold(parents: tuple[int, ...], replacement: bool) -> None:
    assert agrees(reject, parents, replacement)
    assert replacement or agrees(reject, parents, replacement, drawn=True)


def mutant_other_replacement(*args, replacement: bool) -> Verdict:
    return reject(*args, replacement=not replacement)


def mutant_accept_by_p(p, q, *rest, replacement: bool) -> Verdict:
    return reject(p, torch.ones_like(q), *rest, replacement=replacement)


def mutant_bonus_from_p(p, q, tokens, parents, valid, coins, pick, *, replacement: bool) -> Verdict:
    def from_p(residual: Tensor, column: Tensor) -> Tensor:
        return pick(p[torch.arange(len(p)), column], column)

    return reject(p, q, tokens, parents, valid, coins, from_p, replacement=replacement)


def mutant_drops_repeats(p, q, tokens, parents, valid, coins, pick, *, replacement: bool) -> Verdict:
    twins = (tokens[:, :, None] == tokens[:, None, :]) & (parents[:, :, None] == parents[:, None, :])
    return reject(p, q, tokens, parents, valid & ~twins.tril(-1).any(-1), coins, pick, replacement=replacement)


def mutant_one_coin(p, q, tokens, parents, valid, coins, pick, *, replacement: bool) -> Verdict:
    return reject(p, q, tokens, parents, valid, coins[:, :1].expand_as(coins), pick, replacement=replacement)


def mutant_first_child_only(p, q, tokens, parents, valid, coins, pick, *, replacement: bool) -> Verdict:
    later = (parents[:, :, None] == parents[:, None, :]).tril(-1).any(-1)
    return reject(p, q, tokens, parents, valid & ~later, coins, pick, replacement=replacement)


def mutant_own_law(p, q, tokens, parents, valid, coins, pick, *, replacement: bool) -> Verdict:
    # Compares with the law after the node and not with the one that it was drawn from.
    return reject(p, p[:, 1:], tokens, parents, valid, coins, pick, replacement=replacement)


@pytest.mark.parametrize(
    ("mutant", "replacement"),
    [
        (mutant_other_replacement, True),
        (mutant_other_replacement, False),
        (mutant_accept_by_p, True),
        (mutant_bonus_from_p, True),
        (mutant_drops_repeats, True),
        (mutant_one_coin, True),
        (mutant_first_child_only, False),
        (mutant_own_law, True),
    ],
)
def test_wrong_rules_are_caught(mutant: Reject, replacement: bool) -> None:
    assert not agrees(mutant, (-1, -1, 0, 1), replacement)


@pytest.mark.parametrize(
    ("replacement", "drawn"), [(True, True), (False, False), (False, True)], ids=["with", "without", "both"]
)
@given(st.integers(0, 10**6), st.sampled_from(SHAPES[1:]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_acceptance_is_the_chance_given_the_tree(
    replacement: bool, drawn: bool, seed: int, parents: tuple[int, ...], reduced: bool
) -> None:
    world = World(seed, sure=not drawn)
    if reduced:  # the drafter has no row for the last token
        world.q = {text: scaled([v for v in q[:-1]] + [Fraction(0)]) for text, q in world.q.items()}
        if any(len([v for v in q if v]) < 2 for q in world.q.values()):
            return
    rule, columns = RULES[replacement], VOCAB - reduced
    for tree, _ in drawn_trees(world, parents, drawn):
        if not drawn and any(len(tree.children(parent)) > columns for parent in {-1, *parents}):
            continue
        p, q, tokens, above = tensors(world, tree)
        context, texts = (above + 1)[0], ((), *tree.texts)
        drawn_from = torch.tensor([[float(v) for v in world.q[text]] for text in texts], dtype=torch.float64)
        got = rule.acceptance(p[0, :, :columns], drawn_from[:, :columns], tokens[0], context)
        reached: dict[int, Fraction] = defaultdict(Fraction)
        for end in outcomes(world, tree, replacement):
            node = end.column - 1
            while node >= 0:
                reached[node] += end.chance
                node = tree.parents[node]
        for node, parent in enumerate(parents):
            above_it = Fraction(1) if parent < 0 else reached[parent]
            if above_it:
                assert float(got[node]) == pytest.approx(float(reached[node] / above_it), abs=1e-12)


@both
def test_acceptance_has_the_derivative_of_its_values(replacement: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    tokens, context = torch.tensor([0, 2, 1, 3, 0]), torch.tensor([0, 0, 0, 1, 1])
    p = torch.randn(3, 5, generator=generator, dtype=torch.float64).softmax(-1)[:, :4]  # a fifth token has no row
    logits = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: RULES[replacement].acceptance(p, z.softmax(-1), tokens, context), (logits,)
    )

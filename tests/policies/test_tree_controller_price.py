"""Which nodes of the chosen shape are verified."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from aurora_rl.policies.tree_controller import Outcome, TreeController
from aurora_rl.policies.tree_shape import TreeShape

NONE = TreeShape(0)


@pytest.mark.parametrize("row", [0.01, 0.04, 0.12, 0.3, 0.9])
@pytest.mark.parametrize("slots", [1, 8])
def test_the_price_keeps_the_nodes_that_make_the_most_of_a_round(row: float, slots: int) -> None:
    """Nodes whose chances are known, and change from round to round: no fixed number of them is as good."""
    most = TreeShape(1, lookup=8).without_drafter(8)
    single = TreeShape(1, lookup=8).without_drafter(1)
    costs = {shape: 1 + row * slots * shape.num_nodes for shape in (NONE, single, most)}
    controller, dice = TreeController({slots: costs}), random.Random(0)
    tokens, seconds = Counter[str](), Counter[str]()

    def count(way: str, kept: list[list[float]]) -> None:
        tokens[way] += slots + sum(map(sum, kept))  # in expectation
        seconds[way] += 1 + row * sum(map(len, kept))

    for number in range(1500):
        chances = [sorted(0.9 * dice.random() ** dice.choice([1, 6]) for _ in range(8)) for _ in range(slots)]
        shape = controller.choose(slots)
        least = controller.price(shape, slots)
        kept = [[chance for chance in each if chance >= least] if shape.depth else [] for each in chances]
        found = [[dice.random() < chance for chance in reversed(each)] for each in kept]
        spent = 1 + row * sum(map(len, kept))
        controller.observe(shape, slots, spent, found=found if shape.depth else (), nodes=sum(map(len, kept)))
        if number >= 500:
            count("price", kept)
            for nodes in range(9):
                count(f"{nodes} nodes", [each[8 - nodes :] for each in chances])
            for tenths in range(1, 10):
                count(f"from {tenths}", [[chance for chance in each if chance >= tenths / 10] for each in chances])
    rates = {way: tokens[way] / seconds[way] for way in tokens}
    assert rates["price"] > 0.985 * max(rates.values()), rates


@pytest.mark.parametrize(("row", "drafted"), [(0.05, True), (0.9, False)])
def test_chains_whose_nodes_are_left_out_do_not_count_as_drafted(row: float, drafted: bool) -> None:
    """Half of the chains of one node are left out; the others are accepted nine times in ten."""
    controller, dice, chosen = TreeController({1: {NONE: 1.0, TreeShape(1): 1.3 + row}}), random.Random(0), 0
    for number in range(1000):
        shape = controller.choose(1)
        chosen += shape.depth if number >= 500 else 0
        there = dice.random() < 0.5
        outcome: Outcome = "undrafted" if not there else "likeliest" if dice.random() < 0.9 else "refused"
        controller.observe(shape, 1, 1.3 + row if shape.depth else 1.0, [[outcome]] if shape.depth else [])
    assert chosen > 400 if drafted else chosen < 100

"""The tree controller on simulated drafters and literal costs."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from aurora_rl.policies import TreeShape
from aurora_rl.policies.tree_controller import Outcome, TreeController

NONE, TREE = TreeShape(0), TreeShape(3, width=3)


def costs(*by_depth: float, per_slot: float = 0.0, slots: int = 1) -> dict[int, dict[TreeShape, float]]:
    """Of chains: seconds by depth at one slot, and what each node of every further slot adds."""
    return {
        count: {TreeShape(d): c + per_slot * d * (count - 1) for d, c in enumerate(by_depth)}
        for count in sorted({1, slots})
    }


@dataclass
class Simulation:
    """Serves with a drafter that is as good at every depth; rounds take what they truly take, more or less."""

    controller: TreeController
    truth: dict[int, dict[TreeShape, float]]
    likeliest: float = 0.0
    sibling: float = 0.0
    slots: int = 1
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    seconds: float = 0.0
    tokens: int = 0
    drafted: list[int] = field(default_factory=list)

    def path(self, shape: TreeShape) -> list[Outcome]:
        out: list[Outcome] = []
        for _ in range(shape.depth):
            if self.dice.random() < self.likeliest:
                out.append("likeliest")
            elif shape.width > 1 and self.dice.random() < self.sibling:
                out.append("sibling")
            else:
                return [*out, "rejected"]
        return out

    def run(self, rounds: int) -> Counter[TreeShape]:
        chosen: Counter[TreeShape] = Counter()
        for _ in range(rounds):
            shape = self.controller.choose(self.slots)
            chosen[shape] += 1
            paths = [self.path(shape) for _ in range(self.slots)] if shape.depth else []
            seconds = self.truth[self.slots][shape] * self.dice.uniform(0.9, 1.1)
            if shape.lookup_only:
                found = [[outcome == "likeliest" for outcome in path] for path in paths]
                self.controller.observe(shape, self.slots, seconds, found=found)
            else:
                self.controller.observe(shape, self.slots, seconds, paths)
            self.seconds += seconds
            self.tokens += self.slots + sum(o in ("likeliest", "sibling") for path in paths for o in path)
            self.drafted.append(shape.depth)
        return chosen


def simulation(table: dict[int, dict[TreeShape, float]], **drafter: float) -> Simulation:
    return Simulation(TreeController(table), table, **drafter)


def test_a_useless_drafter_is_given_up_and_tried_ever_less_often() -> None:
    serving = simulation(costs(1.0, 1.2, 1.3, 1.4))
    assert serving.run(60)[NONE] > 0
    probed = [sum(depth > 0 for depth in serving.drafted[-2000:]) for _ in range(4) if serving.run(2000)]
    assert probed[0] > 0 and probed == sorted(probed, reverse=True) and probed[-1] <= 30
    # In all, the first rounds included. Plain decoding delivers a token a second.
    assert serving.tokens / serving.seconds > 0.99


def test_probing_loses_less_than_it_may_even_if_weights_are_swapped_all_the_time() -> None:
    serving = simulation(costs(1.0, 2.0, 3.0))
    for _ in range(400):
        serving.run(20)
        serving.controller.swapped()
    assert serving.tokens / serving.seconds > 0.97


def test_after_a_swap_an_improved_drafter_is_found_soon() -> None:
    serving = simulation(costs(1.0, 1.1, 1.2, 1.3))
    serving.run(4000)
    assert serving.run(200)[NONE] == 200
    serving.likeliest = 0.7
    serving.controller.swapped()
    chosen = serving.run(100)
    assert chosen[NONE] == 0 and serving.controller.choose(1).depth == 3


def test_without_a_swap_better_traffic_is_found_too() -> None:
    serving = simulation(costs(1.0, 1.1, 1.2, 1.3))
    serving.run(3000)
    serving.likeliest = 0.7
    serving.run(3000)
    assert serving.drafted[-1] == 3


def test_in_every_phase_the_choice_is_within_three_percent_of_the_best_fixed_shape() -> None:
    table = costs(1.0, 1.15, 1.3, 1.45, 1.6)
    serving = simulation(table)
    for likeliest in (0.0, 0.2, 0.4, 0.6, 0.8, 0.3, 0.9, 0.05):
        serving.likeliest = likeliest
        serving.controller.swapped()
        chosen = serving.run(2000)
        tokens = {shape: sum(likeliest**d for d in range(shape.depth + 1)) for shape in table[1]}
        best = max(tokens[shape] / table[1][shape] for shape in table[1])
        spent = sum(count * table[1][shape] for shape, count in chosen.items())
        assert sum(count * tokens[shape] for shape, count in chosen.items()) / spent > 0.97 * best, likeliest


def test_an_improving_drafter_is_drafted_deeper_up_to_what_pays() -> None:
    serving = simulation(costs(1.0, 1.15, 1.3, 1.45, 2.4))
    usual = []
    for likeliest in (0.0, 0.3, 0.7, 0.95):
        serving.likeliest = likeliest
        serving.controller.swapped()
        serving.run(200)
        usual.append(serving.run(300).most_common(1)[0][0].depth)
    # 1.3 / 1.15 at depth 1 against 1.39 / 1.3; 2.53 / 1.45 at depth 3; the fourth level costs as much as a round.
    assert usual == [0, 1, 3, 3]


def test_acceptance_that_collapses_without_a_swap_is_noticed() -> None:
    serving = simulation(costs(1.0, 1.2, 1.4, 1.6), likeliest=0.8)
    serving.run(1000)
    assert serving.drafted[-1] == 3
    serving.likeliest = 0.0
    serving.run(150)
    assert serving.run(400)[NONE] > 350


@pytest.mark.parametrize("shape", [TreeShape(1), TreeShape(1, 4, 4), TreeShape(3, 3)])
@pytest.mark.parametrize("cost", [1.03, 1.04, 1.06, 1.08, 1.1, 1.12, 1.2, 1.5])
def test_a_drafter_that_becomes_useless_is_given_up_however_cheap_it_is(shape: TreeShape, cost: float) -> None:
    serving = simulation({1: {NONE: 1.0, shape: cost}}, likeliest=1.0)
    serving.run(500)
    assert serving.drafted[-1] == shape.depth
    serving.likeliest = 0.0
    serving.run(1500)
    # Probes are left, which may lose a fiftieth of the time.
    start, tokens = serving.seconds, serving.tokens
    assert serving.run(1000)[NONE] > 500
    assert (serving.tokens - tokens) / (serving.seconds - start) > 0.975


def test_a_drafter_that_recovered_and_fails_again_is_given_up_as_soon() -> None:
    serving = simulation(costs(1.0, 1.1), likeliest=0.9)
    for _ in range(2):
        serving.likeliest = 0.9
        serving.controller.swapped()
        serving.run(1500)
        assert serving.drafted[-1] == 1
        serving.likeliest = 0.0
        serving.run(500)
        assert serving.run(300)[NONE] > 200


def test_speculation_is_off_in_a_large_batch_and_on_again_in_a_small_one() -> None:
    serving = simulation(costs(1.0, 1.1, 1.2, per_slot=0.2, slots=8), likeliest=0.5)
    serving.run(200)
    assert serving.drafted[-1] == 2
    serving.slots = 8  # 1.5 tokens in 2.5 seconds
    assert serving.run(300)[NONE] > 280
    serving.slots = 1
    assert serving.run(5)[NONE] == 0


def test_between_measured_numbers_of_slots_costs_are_interpolated() -> None:
    table = {1: {NONE: 1.0, TreeShape(1): 1.0}, 4: {NONE: 1.0, TreeShape(1): 3.4}}
    controller = TreeController(table)
    for _ in range(100):
        controller.observe(TreeShape(1), 1, 1.0, [["likeliest"]])
    # Nearly two tokens take 1, 1.8 and 2.6 seconds.
    assert [controller.choose(occupied).depth for occupied in (1, 2, 3)] == [1, 1, 0]


def test_a_chain_is_chosen_where_the_rows_of_a_tree_are_expensive() -> None:
    shapes = TreeController.candidates(TREE)
    rows = {s: 1.0 + 0.05 * s.depth + 0.02 * s.num_nodes for s in shapes}
    table = {1: {s: 1.0 + 0.05 * s.depth for s in shapes}, 8: rows}
    serving = simulation(table, likeliest=0.6, sibling=0.4)
    serving.run(100)
    assert serving.run(100).most_common(1)[0][0] == TREE
    serving.slots = 8
    assert serving.run(100).most_common(1)[0][0] == TreeShape(3, 1, 3)


def test_trees_tell_what_chains_would_have_had() -> None:
    controller = TreeController({1: dict.fromkeys(TreeController.candidates(TREE), 1.0)}, memory=10**9)
    rounds: list[list[Outcome]] = [
        *[["likeliest", "sibling", "undrafted"]] * 500,
        *[["likeliest", "rejected"]] * 300,
        *[["rejected"]] * 200,
    ]
    controller.observe(TREE, 1000, 1.0, rounds)
    # Where nothing was drafted a chain would have had a child: depth 3 is untried for it, as good as depth 2.
    assert controller.acceptance(TreeShape(3)) == pytest.approx([0.8, 0.0, 0.0], abs=0.01)
    assert controller.acceptance(TREE) == pytest.approx([0.8, 500 / 800, 0.0], abs=0.01)


def test_what_was_not_tried_is_as_good_as_the_depth_before() -> None:
    controller = TreeController(costs(1.0, 1.1, 1.2, 1.3), memory=10**9)
    controller.observe(TreeShape(1), 100, 1.0, [["likeliest"]] * 75 + [["rejected"]] * 25)
    # The guess: 1 of 4.
    assert controller.acceptance(TreeShape(3)) == pytest.approx([76 / 104] * 3)


def test_of_equally_good_shapes_the_deepest_is_chosen() -> None:
    # 1.5 tokens in 1.2 seconds and 1.75 in 1.407: half a percent less.
    controller = TreeController(costs(1.0, 1.2, 1.407), memory=10**9)
    half: list[Outcome] = ["likeliest", "likeliest"]
    paths: list[list[Outcome]] = [half] * 250 + [["likeliest", "rejected"]] * 250 + [["rejected"]] * 500
    controller.observe(TreeShape(2), 1000, 1.407, paths)
    assert controller.choose(1) == TreeShape(2)


def test_a_machine_that_slows_down_changes_no_choice() -> None:
    # Speculation pays by a tenth. Everything takes three times as long from some moment on, in which nothing is plain.
    serving = simulation(costs(1.0, 1.3), likeliest=0.43)
    serving.run(300)
    serving.truth = {1: {shape: 3 * seconds for shape, seconds in serving.truth[1].items()}}
    assert serving.run(300)[NONE] < 30


def test_what_drafting_really_costs_is_learned_from_windows_of_plain_decoding() -> None:
    # By what was measured at start half of what is drafted pays; what else a live round takes, it does not.
    serving = simulation(costs(1.0, 1.2), likeliest=0.5)
    serving.truth = {1: {NONE: 1.0, TreeShape(1): 1.7}}
    for _ in range(10):
        serving.run(100)
        for _ in range(32):
            serving.controller.observe(NONE, 1, 1.0)
    assert serving.run(300)[NONE] > 250


def test_a_machine_whose_speed_wanders_does_not_bring_drafts_back_and_forth() -> None:
    # One draft in thirty is accepted: enough for the costs that were measured at start, not for those of live rounds.
    serving = simulation(costs(1.0, 1.02), likeliest=0.03)
    plain = 0.0
    for turn in range(80):
        speed = 1 + 0.25 * (turn % 3)
        serving.truth = {1: {NONE: speed, TreeShape(1): 1.2 * speed}}
        before = serving.tokens
        serving.run(45)
        plain += speed * (serving.tokens - before)
        for _ in range(5):
            serving.controller.observe(NONE, 1, speed)
    starts = sum(a == 0 < b for a, b in pairwise(serving.drafted))
    assert 0 < starts <= 12  # probes
    assert plain / serving.seconds > 0.98


def test_one_round_that_the_machine_held_up_changes_nothing() -> None:
    controller = TreeController(costs(1.0, 1.1, 1.2))
    for seconds in [1.2] * 100 + [50.0]:
        controller.observe(TreeShape(2), 1, seconds, [["likeliest", "likeliest"]])
    assert controller.choose(1) == TreeShape(2)


def test_one_slow_round_soon_after_plain_rounds_changes_nothing_either() -> None:
    controller = TreeController(costs(1.0, 1.1, 1.2))
    for _ in range(10):
        controller.observe(NONE, 1, 1.0)
    for seconds in [1.2] * 40 + [500.0]:
        controller.observe(TreeShape(2), 1, seconds, [["likeliest", "likeliest"]])
    assert controller.choose(1) == TreeShape(2)


def test_what_lookup_adds_below_the_tree_counts_for_it() -> None:
    controller, drafted = TreeController(costs(1.0, 1.3)), 0
    for _ in range(500):
        shape = controller.choose(1)
        drafted += shape.depth
        # The drafter's own nodes are refused; two tokens in 1.3 seconds all the same.
        controller.observe(shape, 1, 1.0 + 0.3 * shape.depth, [["rejected"]] * shape.depth, below=shape.depth)
    assert drafted == 500


CHAIN, ALONE = TreeShape(1), TreeShape(1, lookup=2).without_drafter(1)


@dataclass
class WithLookup(Simulation):
    """Drafts are accepted with chance ``likeliest``, and what lookup finds, at less cost, with chance ``found``."""

    found: float = 0.0

    def path(self, shape: TreeShape) -> list[Outcome]:
        if not shape.lookup_only:
            return super().path(shape)
        return ["likeliest"] if self.dice.random() < self.found else ["undrafted"]


def with_lookup(**drafter: float) -> WithLookup:
    table = {1: {NONE: 1.0, ALONE: 1.02, CHAIN: 1.15}}
    return WithLookup(TreeController(table), table, **drafter)


@pytest.mark.parametrize(
    ("likeliest", "found", "usual"),
    [
        (0.3, 0.3, ALONE),  # 1.3 / 1.15 against 1.3 / 1.02
        (0.9, 0.3, CHAIN),  # 1.9 / 1.15 against 1.27
        (0.9, 0.9, ALONE),
        (0.1, 0.0, NONE),
    ],
)
def test_lookup_alone_is_chosen_where_it_delivers_most(likeliest: float, found: float, usual: TreeShape) -> None:
    serving = with_lookup(likeliest=likeliest, found=found)
    serving.run(200)
    chosen = serving.run(2000)
    assert chosen.most_common(1)[0][0] == usual and chosen[usual] > 1400
    best = max(1.0, (1 + found) / 1.02, (1 + likeliest) / 1.15)
    assert serving.tokens / serving.seconds > 0.96 * best


def test_a_drafter_or_a_lookup_that_improves_or_fails_takes_or_loses_its_turn() -> None:
    serving = with_lookup(likeliest=0.1, found=0.3)
    assert serving.run(1000).most_common(1)[0][0] == ALONE
    serving.likeliest = 0.9
    serving.controller.swapped()
    serving.run(600)
    assert serving.run(300).most_common(1)[0][0] == CHAIN
    serving.likeliest = 0.1
    assert serving.run(1500).most_common(1)[0][0] == ALONE
    serving.found = 0.0
    serving.run(1500)
    assert serving.run(1000).most_common(1)[0][0] == NONE
    serving.found = 0.4  # other traffic, which repeats itself: nobody tells
    assert serving.run(1000).most_common(1)[0][0] == ALONE


def test_drafter_and_lookup_are_measured_apart() -> None:
    controller = TreeController({1: {NONE: 1.0, ALONE: 1.0, CHAIN: 2.0}}, memory=10**9)
    controller.observe(ALONE, 1000, 3.0, found=[*[[True]] * 300, *[[]] * 700])
    assert controller.acceptance(ALONE) == pytest.approx([(300 + 4 * 0.75) / 1004])
    assert controller.acceptance(CHAIN) == [0.25]  # the guess
    controller.observe(CHAIN, 1000, 1.0, [["likeliest"]] * 800 + [["rejected"]] * 200)
    assert controller.acceptance(CHAIN) == pytest.approx([801 / 1004])
    assert controller.acceptance(ALONE) == pytest.approx([303 / 1004])


def test_candidates_with_lookup_alone() -> None:
    found = TreeController.candidates(TreeShape(2, width=2, num_nodes=4, lookup=2))
    assert [(s.depth, s.width, s.num_nodes, s.lookup_only) for s in found] == [
        (0, 2, 0, False), (1, 2, 4, False), (2, 2, 4, False), (1, 1, 1, True), (2, 2, 2, True),
    ]  # fmt: skip
    assert [s.num_nodes for s in TreeController.candidates(TreeShape(1, lookup=11))[2:]] == [1, 11]


def test_a_round_of_many_nodes_tells_what_fewer_would_have_delivered() -> None:
    shapes = {n: TreeShape(1, lookup=4).without_drafter(n) for n in (1, 2, 4)}
    table = {1: {NONE: 1.0, **dict.fromkeys(shapes.values(), 1.0)}}
    controller = TreeController(table, memory=10**9)
    controller.observe(shapes[4], 1000, 1.0, found=[
        *[[True, False, True, False]] * 400, *[[False, True]] * 300, *[[]] * 300,
    ])  # fmt: skip
    expected = [400, 300, 400, 0]
    guesses = [0.75]
    for hits in expected:
        guesses.append((hits + 4 * guesses[-1]) / 1004)
    assert controller.acceptance(shapes[4]) == pytest.approx(guesses[1:])
    assert controller.acceptance(shapes[2]) == pytest.approx(guesses[1:3])
    # What is not looked up now fades towards the guess, and what is looked up does not.
    controller = TreeController(table, memory=50)
    for _ in range(300):
        controller.observe(shapes[1], 1, 1.0, found=[[]])
    first, second = controller.acceptance(shapes[2])
    assert first < 0.1 and second == pytest.approx(first)  # as good as the one before, of which more is known


def test_plain_decoding_is_chosen_where_there_is_nothing_else() -> None:
    assert TreeController({1: {NONE: 1.0}}).choose(1) == NONE


def test_sampled_trees_are_not_compared_with_chains() -> None:
    most = TreeShape(2, 2, 4, mode="sampled")
    assert [(s.depth, s.width) for s in TreeController.candidates(most)] == [(0, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    "table",
    [{}, {1: {TreeShape(1): 1.0}}, {1: {NONE: 1.0, TreeShape(0, 2): 1.0}}, {1: {NONE: 1.0}, 2: {TREE: 1.0}}],
)
def test_costs_that_cannot_be_compared_are_refused(table: dict[int, dict[TreeShape, float]]) -> None:
    with pytest.raises(ValueError, match="one of them of depth 0; got .depth, width. by number"):
        TreeController(table)


def test_a_round_without_the_drafter_is_one_of_lookup_or_plain() -> None:
    most = TreeShape(3, width=4, num_nodes=4, lookup=2)
    shapes = TreeController.candidates(most)
    merging = TreeController({1: dict.fromkeys(shapes, 1.0)})
    for shape in shapes[1:]:
        assert merging.without_drafter(shape) == most.without_drafter(2)
    most = TreeShape(3, width=4, num_nodes=4)
    drafter_alone = TreeController({1: dict.fromkeys(TreeController.candidates(most), 1.0)})
    assert drafter_alone.without_drafter(most) == drafter_alone.plain


def test_requests_that_the_drafter_fails_do_not_make_drafting_look_cheap() -> None:
    table, dice = costs(1.0, 1.5), random.Random(1)
    controller, seconds, tokens, failed = TreeController(table), 0.0, 0, False
    for number in range(8000):
        if number % 60 == 0:  # a request
            failed = dice.random() < 0.7
        shape = controller.choose(1)
        if failed:
            shape = controller.without_drafter(shape)
        hit = shape.depth > 0 and dice.random() < 0.3  # 1.3 tokens in 1.5 seconds do not pay
        controller.observe(shape, 1, table[1][shape], [["likeliest" if hit else "rejected"]] * shape.depth)
        seconds, tokens = seconds + table[1][shape], tokens + 1 + hit
    # With failed requests' rounds booked as drafted ones, in which nothing failed and that took a second, it is 0.963.
    assert tokens / seconds > 0.99

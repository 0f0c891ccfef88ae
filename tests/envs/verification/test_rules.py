"""Verification rules, and the proof that what is delivered is the target's own text.

Losslessness is shown twice. Exactly: a toy target with rational probabilities draws by inverse CDF from one four-sided
coin per position, every outcome of the coins and every small tree is enumerated, and integers are compared. And token
by token: the real rule with its real noise against a sampler of one token at a time. Both checks then have to reject
wrong rules.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from fractions import Fraction
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor
from tree_contexts import contexts

from aurora_kernels.noise import argmax
from aurora_kernels.trees import accepted_path, depths, last_accepted, valid_nodes
from aurora_rl.envs.verification.rules import (
    RULES,
    Greedy,
    SampleAndMatch,
    Verdict,
    VerificationRule,
    descend,
    get_rule,
    register_rule,
    rule_of_code,
    settle,
)
from aurora_rl.sampling_params import SamplingBatch
from aurora_rl.trajectories import rule_code

# ---------------------------------------------------------------------------------------------------------------------
# Registry and shapes
# ---------------------------------------------------------------------------------------------------------------------


def test_rules_by_name() -> None:
    assert get_rule("greedy") is Greedy and get_rule("sample_and_match") is SampleAndMatch
    with pytest.raises(ValueError, match="rule is called 'sample_match'; did you mean 'sample_and_match'[?]"):
        get_rule("sample_match")
    with pytest.raises(ValueError, match="'gredy'; did you mean 'greedy'[?] There are block, greedy, reject.*:Thing"):
        get_rule("gredy")


def test_a_name_is_taken_once_and_a_rule_keeps_its_name() -> None:
    assert register_rule("greedy")(Greedy) is Greedy  # a module that is imported twice does no harm

    class Usurper(Greedy):  # type: ignore[misc]
        pass

    owner = "aurora_rl.envs.verification.rules:Greedy"
    with pytest.raises(ValueError, match=f"the verification rule name 'greedy' belongs to {owner}; choose another"):
        register_rule("greedy")(Usurper)
    with pytest.raises(ValueError, match=f"{owner} is the verification rule 'greedy' already; use that name in the pl"):
        register_rule("argmax")(Greedy)
    assert get_rule("greedy") is Greedy and Greedy.name == "greedy" and "argmax" not in RULES


def test_a_rule_by_its_import_path_takes_the_place_of_no_other_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "usurping_rules.py").write_text(
        "from aurora_rl.envs import VerificationRule\n"
        "class Usurper(VerificationRule):\n    name, verify, acceptance = 'sample_and_match', None, None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    usurper = get_rule("usurping_rules:Usurper")
    assert usurper.name == "usurping_rules:Usurper" and rule_of_code(rule_code(usurper.name)) is usurper
    assert rule_of_code(rule_code("sample_and_match")) is SampleAndMatch and SampleAndMatch.name == "sample_and_match"


def test_rules_of_one_class_name_in_two_modules_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "from aurora_rl.envs import SampleAndMatch\nclass MyRule(SampleAndMatch):\n    pass\n"
        "class Registered(SampleAndMatch):\n    pass\n"
    )
    for name in ("rules_of_one", "rules_of_two"):
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    first, second = get_rule("rules_of_one:MyRule"), get_rule("rules_of_two:MyRule")
    codes = [rule_code(rule.name) for rule in (first, second)]
    assert codes[0] != codes[1] and [rule_of_code(code) for code in codes] == [first, second]
    # Each process knows a registered rule by its name, whether its own configuration has the name or the path.
    registered = RULES.register("one")(importlib.import_module("rules_of_one").Registered)
    assert get_rule("rules_of_one:Registered") is registered and registered.name == "one"


@pytest.mark.parametrize("rule", [Greedy(), SampleAndMatch()])
def test_shapes_that_do_not_belong_together_are_refused(rule: VerificationRule) -> None:
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
        assert argmax(layout).tolist() == expected
    flat = torch.zeros(1, 1, dtype=dtype).expand(4, vocab_size)
    assert argmax(flat).tolist() == [0] * 4


def test_greedy_by_hand() -> None:
    # Root -> 1, then after node 1 (token 1) -> 0, after node 2 (token 0) a tie of 1 and 2 -> 1.
    logits = torch.tensor([[[0, 5, 0], [9, 0, 0], [3, 2, 1], [0, 4, 4]]]).float()
    tokens, parents = torch.tensor([[0, 1, 0]]), torch.tensor([[-1, -1, 1]])
    valid = torch.ones(1, 3, dtype=torch.bool)
    verdict = Greedy().verify(logits, tokens, parents, valid, torch.tensor([0]), SamplingBatch.from_params([None]))
    assert verdict.accepted.tolist() == [[False, True, True]] and verdict.bonus_token.tolist() == [1]
    p = logits.softmax(-1)
    assert Greedy().acceptance(p[0], None, tokens[0], parents[0] + 1).tolist() == [0.0, 1.0, 1.0]


def test_acceptance_by_hand_and_of_repeated_siblings() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125], [0.0, 1.0, 0.0]])
    tokens, context = torch.tensor([0, 1, 0, 2, 1]), torch.tensor([0, 1, 0, 1, 2])
    assert SampleAndMatch().acceptance(p, None, tokens, context).tolist() == [0.5, 0.75, 0.0, 0.125, 1.0]
    assert Greedy().acceptance(p, None, tokens, context).tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
    # A target whose choice lies outside the draft vocabulary accepts nothing.
    assert Greedy().acceptance(torch.zeros_like(p), None, tokens, context).tolist() == [0.0] * 5


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


def with_repeated_siblings(r: Round) -> Verdict:
    """As independent draws give them."""
    return descend(r.choose, r.tokens, r.parents, torch.ones_like(r.valid), r.positions)


@pytest.mark.parametrize("verify", [by_descending, by_settling_all, with_repeated_siblings])
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
    context = torch.arange(len(tokens))[:, None] * 4 + parents + 1
    flat = SampleAndMatch().acceptance(p.flatten(0, 1), None, tokens.flatten(), context.flatten())
    conditional = torch.where(r.valid, flat.view_as(tokens), 0.0)
    along_path = conditional.clone()
    for node in range(3):
        above = parents[:, node]
        along_path[:, node] *= torch.where(above >= 0, along_path.gather(1, above.clamp(min=0)[:, None])[:, 0], 1.0)
    # Dyadic numbers: float64 holds both sides exactly.
    assert torch.equal(drawn, along_path)


# ---------------------------------------------------------------------------------------------------------------------
# Wrong rules, which the same check has to reject
# ---------------------------------------------------------------------------------------------------------------------


def target_only(p: list[Fraction], children: list[int], coin: Fraction) -> int | list[Fraction]:
    """A step of SGLang's rule, at thresholds of 1: one coin for all siblings, against what their p adds up to.

    Returns the place of the child that is accepted, or else the law of the token that is drawn instead.
    """
    total = Fraction(0)
    for place, token in enumerate(children):
        total += p[token]
        if coin < total:
            return place
    return [Fraction(0) if token in children else chance / (1 - total) for token, chance in enumerate(p)]


@pytest.mark.parametrize("children", [[], [0], [2, 1], [1, 0], [3, 0, 2]])
def test_target_only_has_the_law_of_sample_and_match(children: list[int]) -> None:
    """So trajectories of SGLang, which verifies by it, are recorded as of sample-and-match."""
    p, sides = [Fraction(n, 12) for n in (1, 5, 2, 4)], 12
    taken, delivered = [Fraction(0)] * len(children), [Fraction(0)] * len(p)
    for side in range(sides):
        found = target_only(p, children, Fraction(2 * side + 1, 2 * sides))
        if isinstance(found, int):
            taken[found] += Fraction(1, sides)
            delivered[children[found]] += Fraction(1, sides)
        else:
            delivered = [sum_ + chance / sides for sum_, chance in zip(delivered, found, strict=True)]
    assert delivered == p and taken == [p[token] for token in children]
    law, context = torch.tensor([[float(chance) for chance in p]]), torch.zeros(len(children), dtype=torch.int64)
    expected = SampleAndMatch().acceptance(law, None, torch.tensor(children, dtype=torch.int64), context)
    assert expected.tolist() == pytest.approx([float(chance) for chance in taken])


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

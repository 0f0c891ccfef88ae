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
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aurora_rl.envs import Request, SampleAndMatch, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.envs.verification.rejection import Rejection, RejectionWithoutReplacement, reject
from aurora_rl.envs.verification.rules import Verdict, VerificationRule, get_rule, require_replayable, rule_of_code
from aurora_rl.objectives import AcceptanceRewardLoss, ExpectedLengthLoss
from aurora_rl.policies import DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape
from aurora_rl.sampling_params import SamplingBatch
from aurora_rl.testing import tiny_target
from aurora_rl.trajectories import pack, rule_code, validate

VOCAB = 3
Law = tuple[Fraction, ...]
RULES = {True: Rejection(), False: RejectionWithoutReplacement()}
both = pytest.mark.parametrize("replacement", [True, False], ids=["with", "without"])

# ---------------------------------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------------------------------


def scaled(values: list[Fraction]) -> Law:
    total = sum(values)
    return tuple(v / total for v in values) if total else tuple(values)


def laws(generator: torch.Generator, size: int = VOCAB, zeros: bool = True) -> Law:
    """A random law in twelfths, now and then with tokens that it excludes."""
    weights = torch.randint(0 if zeros else 1, 7, (size,), generator=generator).tolist()
    return scaled([Fraction(w) for w in weights]) if sum(weights) else laws(generator, size, zeros)


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


# ---------------------------------------------------------------------------------------------------------------------
# With its noise
# ---------------------------------------------------------------------------------------------------------------------


def chi_square(counts: Tensor, law: Tensor) -> float:
    expected = law * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def draw_and_verify(rule: VerificationRule, count: int, seen: bool = False) -> Tensor:
    """First tokens of many requests of one prompt, drafted two at a time; ``seen``: by the coins of verification."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.tensor([1.0, 0.0, -0.5, 0.5], dtype=torch.float64)
    q = torch.tensor([0.1, 0.4, 0.3, 0.2], dtype=torch.float64)
    replacement = rule.name == "rejection"
    tokens = torch.stack([q.multinomial(2, replacement, generator=generator) for _ in range(count)])
    sampling = SamplingBatch.from_params([SamplingParams(1.0, seed=seed) for seed in range(count)])
    position = torch.full((count,), 40)
    if seen:
        from aurora_rl.envs.verification.sampling import uniform

        coins = uniform(sampling.seed[:, None], position[:, None] + 1, torch.arange(4), 1)
        tokens = coins.argsort(-1)[:, :2]  # tokens whose coin is low are accepted
    verdict = rule.verify(
        logits.expand(count, 3, 4), tokens, torch.full((count, 2), -1), torch.ones(count, 2, dtype=torch.bool),
        position, sampling, q.expand(count, 2, 4),
    )  # fmt: skip
    first = torch.where(verdict.accepted[:, 0], tokens[:, 0], verdict.bonus_token)
    return torch.where(verdict.accepted[:, 1], tokens[:, 1], first).bincount(minlength=4)


@both
def test_the_noise_draws_the_law(replacement: bool) -> None:
    law = torch.tensor([1.0, 0.0, -0.5, 0.5], dtype=torch.float64).softmax(-1)
    assert chi_square(draw_and_verify(RULES[replacement], 20_000), law) < 21.1  # 3 degrees of freedom, one in 10 000
    assert chi_square(draw_and_verify(RULES[replacement], 20_000, seen=True), law) > 1000  # the drafter saw the coins


def test_without_nodes_verification_is_plain_sampling() -> None:
    logits, nodes = torch.randn(50, 1, 7), torch.zeros(50, 0, dtype=torch.int64)
    sampling = SamplingBatch.from_params([SamplingParams(0.8, 5, 0.9, seed) for seed in range(50)])
    arguments = (logits, nodes, nodes, nodes.bool(), torch.full((50,), 9), sampling)
    plain = get_rule("sample_and_match")().verify(*arguments)
    assert torch.equal(Rejection().verify(*arguments, torch.zeros(50, 0, 7)).bonus_token, plain.bonus_token)


def test_rejection_needs_the_drafters_distribution() -> None:
    nodes = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"'rejection' needs q \[B, N, V\], got None"):
        Rejection().verify(
            torch.zeros(1, 3, 5), nodes, nodes - 1, nodes.bool(), nodes[:, 0], SamplingBatch.from_params([None])
        )
    with pytest.raises(ValueError, match="'rejection' depends on q, which is missing"):
        Rejection().acceptance(torch.ones(1, 1), None, nodes[0], nodes[0])


def test_a_sibling_that_repeats_another_takes_nothing_from_those_after_it() -> None:
    """Refused with 0.8, the first leaves r = (0, 1/2, 1/2) and q = (0, 0.6, 0.4), which the second passes on."""
    p, q = torch.tensor([[0.1, 0.5, 0.4]]), torch.tensor([[0.5, 0.3, 0.2]])
    chances = RejectionWithoutReplacement().acceptance(p, q, torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(chances, torch.tensor([0.2, 0.0, 0.8 * 0.5 / 0.6]))


@pytest.mark.parametrize("replacement", [True, False])
def test_a_rejection_that_only_rounding_brings_about_leaves_the_law(replacement: bool) -> None:
    """Of equal distributions nothing is left to draw the bonus token from."""
    p = torch.tensor([[[0.0, 0.5, 0.5]] * 2])
    seen: list[Tensor] = []

    def pick(residual: Tensor, column: Tensor) -> Tensor:
        seen.append(residual)
        return residual.argmax(-1)

    coins = torch.ones(1, 1)  # a number just below 1 times the mass rounds to the mass
    parts = torch.tensor([[1]]), torch.tensor([[-1]]), torch.tensor([[True]])
    verdict = reject(p, p[:, :1], *parts, coins, pick, replacement=replacement)
    assert not verdict.accepted.any()
    torch.testing.assert_close(seen[0], p[:, 0])


# ---------------------------------------------------------------------------------------------------------------------
# In the environment
# ---------------------------------------------------------------------------------------------------------------------


def serve(
    rule: str,
    mode: str,
    temperature: float,
    count: int,
    slots: int,
    depth: int = 2,
    drawn: str | None = None,
    speculate: bool = True,
    with_q: bool = True,
) -> tuple[list, Tensor]:
    """Requests served to their end, and the law of their first token; ``drawn`` is the policy's own draft mode."""
    model = tiny_target(seed=4)
    drafter = Eagle3Drafter.from_target(TargetParts.of(model), draft_vocab=torch.arange(1, 13)).double().eval()
    engine = TransformersEngine(model, num_slots=slots, max_length=16, feature_layers=drafter.feature_layers)
    prompt = torch.tensor([3, 5, 9])
    waiting = [Request(i, prompt, SamplingParams(temperature, seed=i, max_tokens=2)) for i in range(count)]
    done: list = []
    shape = TreeShape(depth, 3, mode=drawn or mode)
    env = SpecDecodeEnv(
        engine, lambda: waiting.pop() if waiting else None, num_nodes=shape.num_nodes, rule=rule, draft_mode=mode,
        on_completion=done.append,
    )  # fmt: skip
    policy = DrafterPolicy(
        drafter, engine.store, num_nodes=shape.num_nodes, shape=shape, generator=torch.Generator().manual_seed(1),
        vocab_size=engine.vocab_size if with_q else None,
    )  # fmt: skip
    policy.speculate = speculate
    td = env.reset()
    while len(done) < count:
        _, td = env.step_and_maybe_reset(policy(td))
    logits = tiny_target(seed=4)(prompt[None]).logits[0, -1]  # the engine changed the other
    return done, (logits.double() / max(temperature, 1e-9)).softmax(-1)


@pytest.mark.parametrize(
    ("rule", "mode"),
    [
        ("rejection", "sampled"),
        ("rejection_without_replacement", "sampled_without_replacement"),
        ("sample_and_match", "sampled"),
    ],
)
def test_served_text_has_the_targets_law(rule: str, mode: str) -> None:
    done, law = serve(rule, mode, temperature=0.7, count=1500, slots=50)
    first = torch.tensor([int(c.tokens[0]) for c in done]).bincount(minlength=len(law))
    likely = law > 0.005
    counts, expected = (
        torch.cat([first[likely], first[~likely].sum()[None]]),
        torch.cat([law[likely], law[~likely].sum()[None]]),
    )
    assert chi_square(counts, expected) < 45  # 16 degrees of freedom at most, one in 10 000
    assert sum(int(c.trajectory["nodes", "accepted"].sum()) for c in done) > 50
    assert all(int(c.trajectory["sampling", "draft_mode"]) > 0 for c in done)


def test_greedy_text_under_rejection_is_the_targets_own() -> None:
    done, _ = serve("rejection", "sampled", temperature=0.0, count=3, slots=2)
    plain_, _ = serve("greedy", "topk", temperature=0.0, count=3, slots=2)
    assert {tuple(c.tokens.tolist()) for c in done} == {tuple(c.tokens.tolist()) for c in plain_}


def test_a_rule_refuses_trees_that_were_drawn_otherwise() -> None:
    with pytest.raises(
        ValueError, match="'rejection' would change the text of trees drawn by 'topk'; .* draft_mode sampled"
    ):
        serve("rejection", "topk", 1.0, 1, 1)


@pytest.mark.parametrize(
    ("rule", "mode", "drawn"),
    [
        ("rejection", "sampled", "sampled_without_replacement"),
        ("rejection", "sampled", "topk"),
        ("sample_and_match", "sampled", "topk"),
        ("sample_and_match", "topk", "sampled"),
    ],
)
def test_trees_that_were_drawn_in_another_mode_than_the_environments_are_refused(
    rule: str, mode: str, drawn: str
) -> None:
    message = f"drawn by '{drawn}', and the environment was made with draft_mode='{mode}'; .*draft_mode=policy.shape"
    with pytest.raises(ValueError, match=message):
        serve(rule, mode, 1.0, 1, 1, drawn=drawn)


def test_a_rule_refuses_trees_without_their_distribution() -> None:
    with pytest.raises(
        ValueError, match=r"'rejection' compares .* no \('draft', 'q'\); .*vocab_size=engine.vocab_size"
    ):
        serve("rejection", "sampled", 1.0, 1, 1, with_q=False)


@pytest.mark.parametrize("drawn", ["sampled", "topk"])
@pytest.mark.parametrize("with_q", [False, True])
def test_rounds_decoded_plainly_need_neither_mode_nor_distribution(drawn: str, with_q: bool) -> None:
    done, _ = serve("rejection", "sampled", 1.0, 3, 2, drawn=drawn, speculate=False, with_q=with_q)
    plain_, _ = serve("sample_and_match", "topk", 1.0, 3, 2, speculate=False)
    assert {c.request.id: c.tokens.tolist() for c in done} == {c.request.id: c.tokens.tolist() for c in plain_}


class Lenient(SampleAndMatch):  # type: ignore[misc]  # of a third party, which may derive where the library does not
    """Sample-and-match by another name: its text does not depend on the drafts either."""


def test_a_third_partys_rule_is_recorded_and_learned_from() -> None:
    path = f"{__name__}:Lenient"
    with pytest.raises(ValueError, match=f"the verification rule of code {rule_code('Lenient')} is not known here"):
        rule_of_code(rule_code("Lenient"))
    parts, losses = TargetParts.of(tiny_target(seed=4)), {}
    drafter = Eagle3Drafter.from_target(parts, draft_vocab=torch.arange(1, 13)).double()
    for name, rule in (("sample_and_match", "sample_and_match"), ("Lenient", path)):
        torch.manual_seed(0)
        done, _ = serve(rule, "sampled", 1.0, 3, 2)
        batch = pack([c.trajectory for c in sorted(done, key=lambda c: c.request.id)])
        assert batch["sampling", "rule"].unique().tolist() == [rule_code(name)]
        width = batch["sequence", "features"].shape[-1]
        validate(done[0].trajectory, vocab_size=len(parts.head), feature_size=width, hidden_size=16)
        kinds = (AcceptanceRewardLoss, partial(ExpectedLengthLoss, contexts="trees"))
        losses[name] = [kind(drafter, parts.head)(batch) for kind in kinds]
    assert rule_of_code(rule_code("Lenient")) is get_rule(path)
    for known, own in zip(losses["sample_and_match"], losses["Lenient"], strict=True):
        assert all(torch.equal(known[key], own[key]) for key in known.keys())


@pytest.mark.parametrize("name", ["rejection", "rejection_without_replacement"])
def test_rules_whose_text_depends_on_the_drafts_are_not_replayed(name: str) -> None:
    with pytest.raises(ValueError, match=f"the rule '{name}' is not replayable: its text depends on what was drafted"):
        require_replayable(get_rule(name))
    require_replayable(get_rule("greedy"))
    require_replayable(get_rule("sample_and_match"))

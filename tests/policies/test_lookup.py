"""Lookup against a search written as its definition, and the trees made of it."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aurora_rl.envs import Request, SamplingParams, SpecDecodeEnv, TransformersEngine
from aurora_rl.policies import DrafterPolicy, NgramDrafter, TargetParts, TreeShape, get_drafter
from aurora_rl.policies.lookup import EarlierAnswers, continuations, ngram_tree
from aurora_rl.testing import tiny_target

texts = st.lists(st.integers(0, 2), max_size=20)  # few tokens, so that runs come again

NINE = SamplingParams(max_tokens=9)


def search(text: list[int], earlier: list[list[int]] | None = None) -> dict[int, Fraction]:
    """The definition: counts after every place of the last tokens, for each length together with the shorter ones."""
    chances: dict[int, Fraction] = {}
    for size in range(1, min(8, len(text)) + 1):
        counts: dict[int, int] = {}
        for weight, where in [(16, text), *((1, answer) for answer in earlier or [])]:
            for end in range(size, len(where)):
                if where[end - size : end] == text[len(text) - size :]:
                    counts[where[end]] = counts.get(where[end], 0) + weight
        if not counts:
            break
        total = sum(counts.values()) + 8
        chances = {t: (counts.get(t, 0) + 8 * chances.get(t, Fraction(0))) / total for t in counts.keys() | chances}
    return chances


@given(texts, st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=4))
def test_continuations_are_those_of_the_definition(text: list[int], answers: list[list[int]]) -> None:
    earlier = EarlierAnswers(100)
    for answer in answers:
        earlier.add(answer)
    found = continuations(text, earlier.tokens())
    assert {token: pytest.approx(float(p)) for token, p in search(text, answers).items()} == found
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert continuations(text) == pytest.approx({token: float(p) for token, p in search(text).items()})


def test_a_match_may_overlap_the_end() -> None:
    assert list(continuations([1, 1, 1])) == [1]
    assert list(continuations([8, 5, 6, 5, 6, 5, 6])) == [5]


def test_nothing_is_known_of_a_token_that_did_not_occur() -> None:
    assert continuations([3, 4]) == {} == continuations([])


def test_longer_matches_and_the_request_s_own_text_count_for_more() -> None:
    earlier = EarlierAnswers(1000)
    for _ in range(3):
        earlier.add([2, 7])
    earlier.add([1, 2, 3])
    assert next(iter(continuations([1, 2], earlier.tokens()))) == 7
    for _ in range(3):
        earlier.add([1, 2, 3])
    assert next(iter(continuations([1, 2], earlier.tokens()))) == 3  # four of both tokens, against three of one
    assert next(iter(continuations([1, 2, 5, 1, 2], earlier.tokens()))) == 5  # one in its own text, against seven


def test_only_the_latest_occurrences_count() -> None:
    earlier = EarlierAnswers(10_000)
    for following in [8] * 600 + [9] * 512:
        earlier.add([1, following])
    assert continuations([1], earlier.tokens()) == {9: pytest.approx(512 / 520)}


def test_a_long_text_that_repeats_itself_is_drafted_for() -> None:
    text = [1, 2, 3, 4, 9] + [1, 2, 3, 4, 5] * 1100 + [1, 2, 3, 4]
    assert continuations(text)[5] > 0.99
    assert ngram_tree(text, TreeShape(2, 2, 4)).tokens == [5, 1]


ANSWERS = st.lists(st.tuples(st.sampled_from([None, "a", "b"]), st.lists(st.integers(0, 9), max_size=12)), max_size=20)


@given(ANSWERS, st.integers(1, 15))
def test_the_newest_answers_are_kept(answers: list[tuple[str | None, list[int]]], capacity: int) -> None:
    """Of all salts together, and each salt has its own."""
    earlier = EarlierAnswers(capacity)
    everything: list[tuple[str | None, int]] = []
    for salt, answer in answers:
        earlier.add(answer, salt)
        everything += [(salt, token) for token in [*answer, -1]]
        kept = everything[-capacity:]
        for each in (None, "a", "b", "c"):
            assert earlier.tokens(each).tolist() == [token for owner, token in kept if owner == each]
        assert earlier._texts.keys() == {owner for owner, _ in kept}
        arrays = [text if text.base is None else text.base for text in earlier._texts.values()]
        assert sum(map(len, arrays)) <= 2 * capacity


@given(texts, st.integers(0, 3), st.integers(1, 3), st.integers(3, 9))
def test_the_tree_holds_the_likeliest_paths(text: list[int], depth: int, width: int, num_nodes: int) -> None:
    tree = ngram_tree(text, TreeShape(depth, width, num_nodes))
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    # All paths by brute force, with the chance of each.
    chance: dict[tuple[int, ...], Fraction] = {(): Fraction(1)}
    for length in range(depth):
        for path in [p for p in chance if len(p) == length]:
            best = sorted(search([*text, *path]).items(), key=lambda item: -item[1])[:width]
            found = {(*path, token): chance[path] * p * Fraction(3, 4) for token, p in best}
            chance |= {path: p for path, p in found.items() if p >= Fraction(1, 20)}
    del chance[()]
    assert len(set(paths)) == len(paths) == min(len(chance), TreeShape(depth, width, num_nodes).num_nodes)
    # By falling chance, so that fewer nodes are the first of more; of equal ones any may be there.
    assert [chance[p] for p in paths] == sorted(chance.values(), reverse=True)[: len(paths)]
    for path, log_prob in zip(paths, tree.log_probs, strict=True):
        assert log_prob == pytest.approx(math.log(float(search([*text, *path[:-1]])[path[-1]])))


def test_a_slot_without_a_match_has_no_nodes() -> None:
    drafter = NgramDrafter(10)
    drafter.allocate(2, 8)
    text = torch.tensor([[7, 8, 1, 7, 8], [1, 2, 3, 4, 5]])
    drafter.extend(torch.arange(2), text, torch.zeros(2, 4, 0), torch.tensor([4, 4]))
    proposal = drafter.propose(torch.arange(2), TreeShape(2))
    assert proposal.mask is not None
    assert proposal.tokens[0].tolist() == [1, 7] and proposal.mask.tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("mode", ["sampled", "sampled_without_replacement"])
def test_sampled_trees_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match="no distribution over all tokens"):
        NgramDrafter(10).propose(torch.tensor([0]), TreeShape(1, mode=mode))


@pytest.mark.parametrize("depth", [1, 3])
def test_lookup_alone_needs_the_text_only(depth: int) -> None:
    target = tiny_target()
    drafter = get_drafter("medusa").from_target(TargetParts.of(target), draft_vocab=torch.arange(20)).double()
    engine = TransformersEngine(target, num_slots=2, max_length=20, feature_layers=drafter.feature_layers)
    queue = [Request(0, torch.tensor([25, 26, 27, 28, 25, 26]), NINE), Request(1, torch.tensor([1, 2, 3]), NINE)]
    env = SpecDecodeEnv(engine, lambda: queue.pop(0) if queue else None, num_nodes=4)
    policy = DrafterPolicy(
        drafter, engine.store, num_nodes=4, shape=TreeShape(depth, 1, depth, lookup=2, lookup_only=True)
    )
    env.reset()
    engine.store.tokens[0, :6], engine.store.lengths[0] = torch.tensor([25, 26, 27, 28, 25, 26]), 6
    draft = policy.draft(torch.ones(2, 1, dtype=torch.bool))
    assert draft["tokens"][0].tolist() == ([27, 28, 25] + [0])[:depth] + [0] * (4 - depth)
    assert draft["parents"][0].tolist() == [-1, 0, 1][:depth] + [-1] * (4 - depth)
    assert draft["log_probs"][0, :depth].tolist() == [-math.inf] * depth  # the drafter did not draw them
    assert policy.looked_up.tolist() == [True, True] and not policy.drafted.any()
    assert policy.drafter.cached.tolist() == [0, 0]


def test_a_tenants_answers_are_deleted_and_leave_room() -> None:
    answers = EarlierAnswers(capacity=12)
    for answer, salt in (([1, 2], "a@x"), ([3], "b@"), ([4, 5], "a@"), ([6], None)):
        answers.add(answer, salt)
    assert (answers.delete("a"), answers.delete("a"), answers.delete("x")) == (2, 0, 0)
    assert [answers.tokens(salt).tolist() for salt in ("a@x", "a@", "b@", None)] == [[], [], [3, -1], [6, -1]]
    answers.add([7] * 7, "a@")
    assert answers.tokens("b@").tolist() == [3, -1] and len(answers.tokens("a@")) == 8
    answers.add([8])
    assert not len(answers.tokens("b@"))  # the oldest goes first, as before

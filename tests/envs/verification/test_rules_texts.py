"""Whole texts under every rule, token by token: those of plain decoding with the same seed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch
from tree_contexts import contexts
from warped import warp_logits

from aurora_kernels.noise import gumbel
from aurora_kernels.trees import accepted_path, valid_nodes
from aurora_rl.envs.verification import rules as verification
from aurora_rl.envs.verification.rules import (
    Greedy,
    SampleAndMatch,
    VerificationRule,
)
from aurora_rl.sampling_params import SamplingBatch, SamplingParams

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


def same_position(draw: Callable) -> Callable:
    return lambda scores, seed, position: draw(scores, seed, position * 0 + FIRST + 1)


def fresh_noise(draw: Callable) -> Callable:
    return lambda scores, seed, position: draw(scores, torch.randint_like(seed, 2**62), position)


def seed_of_the_slot(draw: Callable) -> Callable:
    return lambda scores, seed, position: draw(scores, torch.arange(len(seed)), position)


def ancestors_skipped(walk: Callable) -> Callable:
    return lambda tokens, parents, valid, choices: walk(tokens, parents.clamp(max=-1), valid, choices)


def shallowest(last_accepted: Callable) -> Callable:
    return lambda accepted: last_accepted(accepted) - accepted.any(1).long()


@pytest.mark.parametrize(
    ("name", "mutate"),
    [
        ("descend", relative_positions),
        ("descend", next_position),
        ("gumbel_argmax", same_position),
        ("gumbel_argmax", fresh_noise),
        ("gumbel_argmax", seed_of_the_slot),
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

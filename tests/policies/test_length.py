"""The length controller on literal acceptance and costs."""

from __future__ import annotations

import pytest
import torch

from aurora_rl.policies.length import LengthController


def feed(length: LengthController, accepted: list[int], rounds: int) -> None:
    """Rounds in which the slots would accept so many nodes, or all that are drafted."""
    for _ in range(rounds):
        drafted = torch.full((len(accepted),), length.depth)
        length.observe(torch.minimum(torch.tensor(accepted), drafted), drafted)


def test_starts_at_one_and_lengthens_step_by_step() -> None:
    length = LengthController([1.0, 1.05, 1.1, 1.15, 1.2])
    assert length.depth == 1
    seen = [1]
    for _ in range(60):
        feed(length, [4], 1)
        if length.depth != seen[-1]:
            seen.append(length.depth)
    assert seen == [1, 2, 3, 4]
    assert length.acceptance == pytest.approx([1.0] * 4, abs=0.2)


def test_shortens_when_acceptance_collapses() -> None:
    length = LengthController([1.0, 1.2, 1.4, 1.6], memory=50)
    feed(length, [3], 60)
    assert length.depth == 3
    feed(length, [0], 100)
    assert length.depth == 1


def test_stays_at_one_where_drafting_is_dear() -> None:
    # Accepting everything, depth 1 delivers 2 tokens in 2 seconds, depth 2 three in 5.
    length = LengthController([1.0, 2.0, 5.0, 9.0])
    feed(length, [3], 100)
    assert length.depth == 1


def test_a_depth_that_is_never_accepted_is_given_up() -> None:
    length = LengthController([1.0, 1.1, 1.2, 1.3, 1.4])
    feed(length, [2], 60)
    # a = 1, 1, 0: E = 1, 2, 3, 3, so depth 2 delivers 3 / 1.2.
    assert length.depth == 2


def test_counts_what_was_tried_given_the_depth_before() -> None:
    length = LengthController([1.0, 1.1, 1.2, 1.3], memory=10**9)
    # 3 drafted: two accepted, so depths 1 and 2 hit, depth 3 was tried in vain. Then none: depth 1 only was tried.
    length.observe(torch.tensor([2] * 9 + [0] * 7), torch.tensor([3] * 16))
    # The prior at depth 1: 2 of 8.
    assert length.acceptance == pytest.approx([(2 + 9) / (8 + 16), 1.0, 0.0])


def test_memory_fades() -> None:
    length = LengthController([1.0, 1.5, 2.0], memory=10)
    feed(length, [2], 200)
    feed(length, [0], 10)
    # Ten rounds at 1 - 1/10: what was before weighs 0.9 ** 10 = 0.35.
    assert length.acceptance[0] == pytest.approx(0.9**10, abs=1e-3)


def test_costs_of_at_least_two_depths_are_needed() -> None:
    with pytest.raises(ValueError, match="depth 0 and 1 are needed, got .1.0."):
        LengthController([1.0])


def test_of_equal_depths_the_deepest() -> None:
    # All accepted: E = 2, 3; at these costs both deliver one token a second.
    length = LengthController([1.0, 2.0, 3.0])
    feed(length, [2], 2000)  # the prior has faded
    assert length.depth == 2


def test_what_a_round_costs_beside_makes_depth_cheaper() -> None:
    # E = 2, 3: 2 / 1 against 3 / 2 alone, 2 / 2 against 3 / 3 with one second beside, and more beside favours depth 2.
    without, beside = LengthController([1.0, 1.0, 2.0]), LengthController([1.0, 1.0, 2.0])
    for _ in range(2000):
        for length, seconds in ((without, None), (beside, {1: 2.0, 2: 3.0})):
            drafted = torch.full((1,), length.depth)
            length.observe(drafted, drafted, seconds and seconds[length.depth])
    assert (without.depth, beside.depth) == (1, 2)

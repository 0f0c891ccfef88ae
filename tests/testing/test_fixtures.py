"""What objectives are checked on: served requests, gaps that hold what they are told, and a drafter that echoes."""

from __future__ import annotations

import torch

from aurora_rl.policies import TargetParts
from aurora_rl.testing import tiny_target
from aurora_rl.testing.fixtures import EchoDrafter, gappy_drafter, served_for_checks
from aurora_rl.trajectories import pack, rule_code, validate


def test_requests_are_served_under_each_rule_and_drawn_where_they_have_to_be() -> None:
    for sampled in (False, True):
        served = served_for_checks(0, sampled=sampled)
        assert served is served_for_checks(0, sampled=sampled)  # kept
        assert [how for how, _ in served] == [
            "served by sample_and_match at temperature 0.7",
            "served by greedy at temperature 0.0",
            "served by rejection at temperature 0.7",
        ]
        for (_, trajectories), rule in zip(served, ("sample_and_match", "greedy", "rejection"), strict=True):
            assert [int(t["sequence", "prompt_length"]) for t in trajectories] == [3, 1, 6]
            for trajectory in trajectories:
                validate(trajectory, vocab_size=32, feature_size=32, hidden_size=16)
                assert int(trajectory["sampling", "rule"]) == rule_code(rule)
                assert (int(trajectory["sampling", "draft_mode"]) > 0) == (sampled or rule == "rejection")


def test_a_gap_holds_its_filler_and_predictions_stay() -> None:
    parts = TargetParts.of(tiny_target())
    drafter, batch = gappy_drafter(parts, 0), pack(served_for_checks(0, sampled=False)[0].trajectories)
    before = drafter.unroll(batch, 4)
    drafter.filler = 7.0
    after = drafter.unroll(batch, 4)
    gap = 7.0 * torch.arange(16, dtype=torch.float64)
    assert torch.equal(before.valid, after.valid) and not before.valid.all() and before.valid.any()
    for logits, told, valid in zip(before.logits, after.logits, before.valid, strict=True):
        assert torch.equal(logits[valid], told[valid])
        assert torch.equal(told[~valid], gap.expand(int((~valid).sum()), -1))


def test_an_echo_says_what_the_target_says() -> None:
    parts = TargetParts.of(tiny_target())
    batch = pack(served_for_checks(0, sampled=False)[0].trajectories)
    echo = EchoDrafter.from_target(parts, draft_vocab=torch.arange(32)).double()
    echo.head = parts.head.weight
    expected = batch["sequence", "hidden"] @ parts.head.weight.T
    for factor in (1.0, 0.0, -1.0):
        echo.factor = factor
        assert all(
            torch.equal(logits, (factor * batch["sequence", "hidden"]) @ parts.head.weight.T)
            for logits in echo.unroll(batch, 2).logits
        )
    echo.factor = 1.0
    assert torch.equal(echo.unroll(batch, 1).logits[0], expected)

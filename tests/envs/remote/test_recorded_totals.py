"""Sums over recorded requests are those of their trajectories."""

from __future__ import annotations

from aurora_rl.envs.remote.recorded_totals import RecordedTotals


def test_before_the_first_request_there_is_no_acceptance_length() -> None:
    assert RecordedTotals().acceptance_length is None
    assert RecordedTotals(speculative_tokens=20, speculative_rounds=8).acceptance_length == 2.5

"""The drafter reads as many rows next to a round as take less than half of its time."""

from __future__ import annotations

import pytest

from aurora_rl.policies import row_budget
from aurora_rl.policies.row_budget import RowBudget


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(row_budget.time, "perf_counter", lambda: now[0])
    return now


def serve(budget: RowBudget, clock: list[float], per_row: float, rounds: int, base: float = 0.05) -> list[float]:
    """Rounds of some seconds in which all rows of the budget are read; returns the seconds that these took."""
    took = []
    for _ in range(rounds):
        rows = budget.begin(waits=True)
        took.append(rows * per_row)
        budget.spent(rows, took[-1])
        clock[0] += base + took[-1]
    return took


@pytest.mark.parametrize("per_row", [1e-4, 2.5e-4, 1e-5])
def test_rows_take_less_than_half_of_a_round(clock: list[float], per_row: float) -> None:
    budget = RowBudget()
    took = serve(budget, clock, per_row, 40)[20:]
    assert max(took) <= 0.0201 if budget.rows < 2048 else budget.rows == 2048 and per_row == 1e-5
    assert min(took) >= 0.0049  # and what was read is not counted as a part of the round


def test_a_slow_drafter_still_gets_on(clock: list[float]) -> None:
    budget = RowBudget()
    serve(budget, clock, 0.01, 20)
    assert budget.rows == 64


def test_neither_the_end_of_a_text_nor_a_pause_nor_a_whole_text_tells(clock: list[float]) -> None:
    budget = RowBudget()
    serve(budget, clock, 1.5e-4, 10)
    rows = budget.rows
    budget.spent(rows - 1, 9.0)
    budget.spent(rows * 9, 9.0)
    clock[0] += 1000.0
    budget.begin(waits=False)
    serve(budget, clock, 1.5e-4, 10)
    assert budget.rows == rows

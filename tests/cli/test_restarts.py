"""The waits before restarts are bounded, however often a process has died."""

from __future__ import annotations

from aurora_rl.cli.restarts import LONGEST_WAIT_S, restart_wait


def test_waits_double_up_to_a_minute_and_stay() -> None:
    waits = [restart_wait(failures) for failures in range(2000)]  # a float has no power of two above 1,023
    assert waits[:6] == [1, 2, 4, 8, 16, 32] and set(waits[6:]) == {LONGEST_WAIT_S}

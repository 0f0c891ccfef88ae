"""Counts by engine: what is told of each, and that names have a bound."""

from __future__ import annotations

from aurora_rl.telemetry.engine_counts import EngineCounts


def test_an_engine_has_what_arrived_what_was_dropped_and_how_far_it_is_behind() -> None:
    counts = EngineCounts()
    counts.arrived("a", 2)
    counts.arrived("a", 4)
    counts.arrived("a", None)  # it drafted nothing
    counts.arrived("b", None)
    counts.dropped("b", "invalid")
    counts.dropped("b", "invalid")
    counts.dropped("", "malformed")
    assert counts.as_json(published=7) == {
        "a": {"trajectories": 3, "version": 4, "staleness": 3, "drops": {}},
        "b": {"trajectories": 1, "version": None, "staleness": None, "drops": {"invalid": 2}},
        "(unnamed)": {"trajectories": 0, "version": None, "staleness": None, "drops": {"malformed": 1}},
    }
    assert counts.as_json(published=3)["a"]["staleness"] == 0  # of a learner that started anew


def test_ever_new_names_are_added_up_and_no_count_is_lost() -> None:
    counts = EngineCounts()
    for number in range(1000):
        counts.arrived("a", 1)
        counts.arrived(f"made-up-{number}", 1)
        counts.dropped(f"made-up-{number}", "invalid")
    known = counts.as_json(published=1)
    assert len(known) == 64 + 1 and known["a"]["trajectories"] == 1000
    assert sum(each["trajectories"] for each in known.values()) == 2000
    assert sum(each["drops"].get("invalid", 0) for each in known.values()) == 1000
    assert known["(others)"]["staleness"] is None

"""Pools of values: their two halves have nothing in common, and numbers are parted by their value."""

from __future__ import annotations

from aurora_rl.workload.pools import POOLS


def texts(values: object) -> set[str]:
    """The texts of values, of which some have several, such as the columns of a table."""
    return {text for value in values for text in ([value] if isinstance(value, str) else value)}  # type: ignore[attr-defined]


def test_the_halves_of_all_pools_are_disjoint() -> None:
    early, late = (set().union(*(texts(halves[half]) for halves in POOLS.values())) for half in (0, 1))
    assert not early & late
    assert all(halves[1] for halves in POOLS.values())  # some are kept for the last quarter as a whole
    assert all(len(half) == len(set(half)) for halves in POOLS.values() for half in halves)


def test_a_number_is_kept_for_the_last_quarter_by_its_value() -> None:
    assert POOLS["few"] == (["2", "3", "4", "6", "8", "9", "10", "11"], ["5", "7", "12"])  # 50, 70, 120: 1, 0, 1 mod 7
    numbers = [POOLS[name] for name in ("few", "some", "many", "price", "percent", "rate", "years", "rent", "money")]
    for half, late in ((0, False), (1, True)):
        assert all((round(float(text) * 10) % 7 < 2) == late for pool in numbers for text in pool[half])


def test_tables_show_their_columns() -> None:
    join = POOLS["join"][0][0]
    assert join.schemas == f"{join.parent}(id, {join.label})\n{join.children}(id, {join.key}, {join.number})"
    table = POOLS["table"][1][0]
    assert table.schema == f"{table.name}(id, {table.label}, {table.group}, {table.number}, {table.date})"

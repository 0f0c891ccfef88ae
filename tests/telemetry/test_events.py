"""The table of events is that of the calls which write them."""

from __future__ import annotations

import ast
from pathlib import Path

from aurora_rl.telemetry.events import EVENTS

PACKAGE = Path(__file__).parents[2] / "aurora_rl"


def written_events() -> dict[str, list[set[str]]]:
    """Fields of each event by the calls of `MetricsLog.write` that name it; `**` hides the fields of a call."""
    found: dict[str, list[set[str]]] = {}
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            match call:
                case ast.Call(ast.Attribute(attr="write"), [ast.Constant(str(event))], [_, *_] as words):
                    found.setdefault(event, []).append({word.arg or "**" for word in words})
    return found


def test_the_table_of_events_is_that_of_the_calls() -> None:
    found = written_events()
    assert set(EVENTS) - set(found) == {"learner_died"}  # view.py writes it by a variable
    for event, calls in found.items():
        told, table = set.union(*calls) - {"**"}, set(EVENTS[event].fields)
        hidden = sum("**" in fields for fields in calls)
        # Where each call hides some, they are not all told; where none does, they are.
        assert told < table if hidden == len(calls) else told <= table if hidden else told == table, event

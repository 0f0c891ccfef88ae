"""Every causal family of the installed transformers has the verdict that docs/families.md gives it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import transformers

from aurora_rl.testing.families import causal_families, verdict

PAGE = Path(__file__).parents[2] / "docs/families.md"
ROWS = dict(line.strip("| \n").split(" | ")[:2] for line in PAGE.read_text().splitlines() if line.startswith("| "))
pinned = pytest.mark.skipif(
    f"transformers {transformers.__version__}," not in PAGE.read_text(), reason="the page is of another transformers"
)


@pinned
def test_the_page_has_every_family() -> None:
    assert sorted(ROWS) == sorted([*causal_families(), "family"])
    assert Counter(outcome.split(" ")[0] for outcome in ROWS.values())["exact"] >= 90


@pinned
@pytest.mark.parametrize("model_type", causal_families())
def test_a_family_has_the_verdict_of_the_page(model_type: str) -> None:
    outcome, note = verdict(model_type)
    assert outcome == ROWS[model_type]
    assert bool(note) == (outcome in ("refused", "not tried"))

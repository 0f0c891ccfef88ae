"""Every causal family of the installed transformers has the line that docs/families.md gives it."""

from __future__ import annotations

import itertools
import re
import runpy
from collections import Counter
from pathlib import Path

import pytest
import transformers
from causal_families import causal_families, try_family

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "families.md").read_text()
HEAD, TABLE = PAGE.split("| family |")
ROWS = dict(line.strip("|").strip().split(" | ", 1) for line in TABLE.splitlines()[2:])
pinned = pytest.mark.skipif(
    f"transformers {transformers.__version__} " not in PAGE, reason="the page is of another transformers"
)


def without_numbers(row: str) -> str:
    """How far logits are apart depends on the CPU."""
    return re.sub(r"\d[\d.]*(e-\d+)?", "N", row).strip()


@pinned
def test_the_page_has_every_family() -> None:
    assert list(ROWS) == causal_families()
    assert Counter(row.split(" ")[0] for row in ROWS.values())["exact"] >= 90


@pinned
def test_what_the_page_says_before_its_table_is_current() -> None:
    lines = runpy.run_path(str(DOCS / "generate.py"))["families"]()
    head = itertools.takewhile(lambda line: not line.startswith("| family |"), lines)
    assert "".join(f"{line}\n" for line in head) == HEAD, "run `python docs/generate.py`"


@pinned
@pytest.mark.parametrize("model_type", causal_families())
def test_a_family_has_the_line_of_the_page(model_type: str) -> None:
    outcome, note = try_family(model_type)
    row = f"{outcome} | {note.replace('|', '/')}"
    assert without_numbers(row) == without_numbers(ROWS[model_type])
    assert bool(note) == (outcome in ("refused", "not tried"))

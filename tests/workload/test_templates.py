"""Templates: two parts of each domain with nothing in common, and a text of its own for every choice of values."""

from __future__ import annotations

from aurora_rl.workload import traffic


def test_every_choice_of_a_template_has_its_own_text() -> None:
    for part in traffic._templates():
        for template in (t for group in part.values() for t in group):
            indices = range(0, template.size, max(1, template.size // 500))
            assert len({template.fill(template.values(index)) for index in indices}) == len(indices), template.name

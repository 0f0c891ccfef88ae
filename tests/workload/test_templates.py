"""Templates: two parts of each domain with nothing in common, and a text of its own for every choice of values."""

from __future__ import annotations

import string

from aurora_rl.workload import traffic
from aurora_rl.workload.pools import POOLS
from aurora_rl.workload.templates import TEMPLATES


def test_every_choice_of_a_template_has_its_own_text() -> None:
    for part in (0, 1):
        for template in (t for group in traffic._templates(part).values() for t in group):
            indices = range(0, template.size, max(1, template.size // 500))
            texts = {template.text.format_map(template.values(index)) for index in indices}
            assert len(texts) == len(indices), template.name


def test_the_templates_of_the_last_quarter_are_no_others() -> None:
    for first, last in TEMPLATES.values():
        assert not first.keys() & last.keys()
        assert not set(first.values()) & set(last.values())
        assert len(first) >= 12
        assert len(last) >= 5


def test_every_field_of_a_template_has_a_pool() -> None:
    for half in (0, 1):
        for text in (text for groups in TEMPLATES.values() for text in groups[half].values()):
            for _, field, _, _ in string.Formatter().parse(text):
                pool, _, part = (field or "few").partition(".")
                pool = pool.rstrip("0123456789")
                assert POOLS[pool][half], f"{field} of {text!r}"
                assert not part or hasattr(POOLS[pool][half][0], part), f"{field} of {text!r}"

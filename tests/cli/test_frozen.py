"""Values that nobody changes."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from aurora_rl.cli.frozen import frozen, plain


@dataclass(frozen=True)
class Part:
    names: tuple[str, ...]
    options: dict[str, object]


def test_a_frozen_value_is_a_copy_to_any_depth() -> None:
    inner = {"deep": [1, {"deeper": [2]}]}
    part = frozen(Part(["a"], inner))  # type: ignore[arg-type]
    inner["deep"].append(3)
    assert part.names == ("a",) and part.options == {"deep": (1, {"deeper": (2,)})}
    for mapping in (part.options, part.options["deep"][1]):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["deep"] = 0
    assert frozen(part) == part


def test_a_plain_value_is_the_callers_and_can_be_written() -> None:
    part = frozen(Part(("a",), {"deep": [1, {"deeper": [2]}]}))
    found = plain(part)
    assert json.loads(json.dumps(found)) == found == {"names": ["a"], "options": {"deep": [1, {"deeper": [2]}]}}
    found["options"]["deep"][1]["deeper"].append(3)
    assert part.options["deep"][1]["deeper"] == (2,)

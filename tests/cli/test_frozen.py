"""Values that nobody changes."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import asdict, dataclass

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
        with pytest.raises(TypeError, match="cannot be changed; make another by dataclasses.replace"):
            mapping["deep"] = 0
    assert frozen(part) == part


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda part: pickle.loads(pickle.dumps(part))])
def test_a_copy_is_frozen_too_and_libraries_take_it(copied: Callable[[Part], Part]) -> None:
    part = frozen(Part(("a",), {"deep": [1]}))
    same = copied(part)
    assert same == part and asdict(same) == {"names": ("a",), "options": {"deep": (1,)}}
    assert json.dumps(same.options) == '{"deep": [1]}'
    for change in (dict.update, dict.setdefault):
        with pytest.raises(TypeError, match="cannot be changed"):
            getattr(same.options, change.__name__)("new", 1)


def test_a_plain_value_is_the_callers_and_can_be_written() -> None:
    part = frozen(Part(("a",), {"deep": [1, {"deeper": [2]}]}))
    found = plain(part)
    assert json.loads(json.dumps(found)) == found == {"names": ["a"], "options": {"deep": [1, {"deeper": [2]}]}}
    found["options"]["deep"][1]["deeper"].append(3)
    assert part.options["deep"][1]["deeper"] == (2,)

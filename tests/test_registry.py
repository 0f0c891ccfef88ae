"""The registry: names, entry points and import paths lead to parts of the right kind, or to a message that helps."""

from __future__ import annotations

import functools
import importlib
import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from aurora_rl import registry
from aurora_rl.registry import Registry

MODULE = "test_registry_parts"


@pytest.mark.parametrize(
    ("room", "part", "names"),
    [
        ("policies", "drafter", {"eagle3", "medusa"}),
        ("objectives", "objective", {"imitation"}),
        ("objectives", "divergence", {"forward_kl"}),
        ("envs", "engine", {"transformers", "sglang"}),
        ("envs", "rule", {"greedy", "rejection"}),
    ],
)
def test_the_five_seams_have_one_face(room: str, part: str, names: set[str]) -> None:
    module = importlib.import_module(f"aurora_rl.{room}")
    seam = getattr(module, f"{part.upper()}S")
    assert isinstance(seam, Registry) and names <= set(seam)
    assert {f"{part.upper()}S", f"get_{part}", f"register_{part}"} <= set(module.__all__)
    with pytest.raises(ValueError, match=f"{part} is called 'nobody'; there are "):
        getattr(module, f"get_{part}")("nobody")


class Part:
    name = "part"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Registry[type[Part]]:
    module = ModuleType(MODULE)
    module.Own = type("Own", (Part,), {"__module__": MODULE})  # type: ignore[attr-defined]

    def points(group: str) -> list[EntryPoint]:
        named = {"installed": f"{MODULE}:Own", "counter": "collections:Counter", "ghost": "no_such_module:Ghost"}
        return [EntryPoint(name, value, group) for name, value in named.items()] if group == "tests.parts" else []

    monkeypatch.setitem(sys.modules, MODULE, module)
    monkeypatch.setattr(registry, "entry_points", points)
    return Registry("part", "tests.parts", Part, reserved=("elsewhere",))


def test_the_three_ways_to_a_part(parts: Registry[type[Part]]) -> None:
    own = sys.modules[MODULE].Own
    assert parts.register("mine")(Part) is Part and parts.get("mine") is Part
    assert parts.get("installed") is own and parts.get(f"{MODULE}:Own") is own
    assert list(parts) == ["counter", "elsewhere", "ghost", "installed", "mine"]
    assert repr(parts) == "<Registry of tests.parts: counter, elsewhere, ghost, installed, mine>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "instaled",
            "no part is called 'instaled'; did you mean 'installed'[?] There are counter, elsewhere, .*:Thing",
        ),
        ("elsewere", "did you mean 'elsewhere'"),
        (f"{MODULE}.Own", f"did you mean '{MODULE}:Own'"),
        (":Own", "no part is called ':Own'"),
        ("counter", "the part 'counter' is collections:Counter, which is no subclass of .*.Part"),
        ("ghost", "the part 'ghost' cannot be imported: No module named 'no_such_module'"),
        (f"{MODULE}:Other", f"'{MODULE}:Other' cannot be imported: .*has no attribute 'Other'"),
        ("a:b:c", "the part 'a:b:c' is no import path; write package.module:Thing"),
        ("my-file:Own", "the part 'my-file:Own' is no import path; write package.module:Thing"),
        ("math:pi", "the part 'math:pi' is math:pi, which is no subclass of .*.Part"),
    ],
)
def test_what_is_no_part_is_named(parts: Registry[type[Part]], name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parts.get(name)


def test_a_name_belongs_to_one_part(parts: Registry[type[Part]]) -> None:
    cells = [type("Cell", (Part,), {"__module__": "__main__"}) for _ in range(2)]  # a notebook's, run again
    assert [parts.register("cell")(cell) for cell in cells] == cells and parts.get("cell") is cells[1]
    with pytest.raises(ValueError, match=f"the part name 'cell' belongs to __main__:Cell; choose .* for {MODULE}:Own"):
        parts.register("cell")(sys.modules[MODULE].Own)
    with pytest.raises(ValueError, match="the part name 'elsewhere' belongs to the configuration"):
        parts.register("elsewhere")(Part)
    with pytest.raises(ValueError, match="the part 'dict' is builtins:dict, which is no subclass of .*.Part"):
        parts.register("dict")(dict)


def test_a_reserved_name_has_no_part(parts: Registry[type[Part]]) -> None:
    wanted = (
        "^the part 'elsewhere' is chosen by the configuration and has no class; get one of counter, ghost, installed$"
    )
    with pytest.raises(ValueError, match=wanted):
        parts.get("elsewhere")


def test_a_part_has_one_name(parts: Registry[type[Part]]) -> None:
    own = sys.modules[MODULE].Own
    assert parts.name_of(own) == "installed"  # its entry point's, before it is loaded
    assert parts.get(f"{MODULE}:Own") is parts.get("installed") is own and parts.name_of(own) == "installed"
    with pytest.raises(ValueError, match=f"^{MODULE}:Own is the part 'installed' already; use that name in the place"):
        parts.register("mine")(own)
    second = sys.modules[MODULE].Other = type("Other", (Part,), {"__module__": MODULE})  # type: ignore[attr-defined]
    assert parts.name_of(second) == f"{MODULE}:Other" and parts.get(f"{MODULE}:Other") is second
    with pytest.raises(ValueError, match=f"is the part '{MODULE}:Other' already"):
        parts.register("other")(second)
    registered = sys.modules[MODULE].Third = type("Third", (Part,), {"__module__": MODULE})  # type: ignore[attr-defined]
    parts.register("third")(registered)
    assert parts.get(f"{MODULE}:Third") is registered and parts.name_of(registered) == "third"


def test_what_is_prepared_is_prepared_once_and_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    def prepare(name: str, part: object) -> type[Part]:
        names.append(name)
        return type("Prepared", (Part,), {})

    prepared: Registry[type[Part]] = Registry("part", "tests.none", Part, prepare=prepare)
    kept = prepared.get("math:sqrt")
    assert prepared.get("math:sqrt") is kept and names == ["math:sqrt"] and prepared.name_of(kept) == "math:sqrt"
    with pytest.raises(ValueError, match="Prepared is the part 'math:sqrt' already; use that name in the place of 'sq"):
        prepared.register("square_root")(kept)
    assert names == ["math:sqrt"]


def test_functions(parts: Registry[type[Part]]) -> None:
    functions = Registry("function", "tests.functions")
    assert functions.get("math:sqrt")(4) == 2
    with pytest.raises(ValueError, match="the function 'math:pi' is math:pi, which is no function"):
        functions.get("math:pi")
    with pytest.raises(ValueError, match="'collections:Counter' is collections:Counter, which is no function"):
        functions.get("collections:Counter")


def test_what_is_called_like_a_function_and_is_none_is_refused() -> None:
    functions: Registry[Any] = Registry("function", "tests.functions")
    with pytest.raises(
        ValueError, match="the function 'squares' is functools:partial, which is no function; write one"
    ):
        functions.register("squares")(functools.partial(pow, exp=2))
    assert functions.register("pow")(pow) is pow

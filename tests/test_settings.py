"""Which keywords there are, of which types, and what is said of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from aurora_rl.settings import check_values, nearest, settings_of


class Parent:
    def __init__(self, drafter: Any, *, steps: int = 3, path: str | None = None) -> None: ...

    @classmethod
    def start(cls, parts: Any, *, options: Mapping[str, Any] | None = None, **more: Any) -> None: ...


class Child(Parent):
    def __init__(self, drafter: Any, *, gamma: float = 1.0, **settings: Any) -> None: ...


class Sealed(Parent):
    def __init__(self, drafter: Any, *, gamma: float = 1.0) -> None: ...


def test_keywords_of_parents_count_where_they_are_passed_on() -> None:
    assert set(settings_of(Child)) == {"drafter", "gamma", "steps", "path"}
    assert set(settings_of(Sealed)) == {"drafter", "gamma"}
    assert set(settings_of(Child.start)) == {"parts", "options"}  # bound, and nobody to pass more on to


@pytest.mark.parametrize(
    ("key", "value"),
    [("steps", 2), ("gamma", 2), ("gamma", 0.5), ("path", None), ("path", "here"), ("drafter", object())],
)
def test_values_that_fit(key: str, value: Any) -> None:
    check_values({key: value}, settings_of(Child), "it")
    check_values({"options": {"a": 1}}, settings_of(Child.start), "it")
    check_values({"hook": print}, {"hook": Callable}, "it")


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({"step": 2}, "it has no setting 'step'; did you mean 'steps'"),
        ({"steps": 2.5}, "it: steps must be an integer, got 2.5"),
        ({"steps": True}, "it: steps must be an integer, got True"),
        ({"gamma": "high"}, "it: gamma must be a number, got 'high'"),
        ({"path": 3}, "it: path must be a string or null, got 3"),
    ],
)
def test_others_are_named(settings: dict[str, Any], wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        check_values(settings, settings_of(Child), "it")


def test_nothing_to_set() -> None:
    with pytest.raises(ValueError, match="it has no setting 'a'; it has none"):
        check_values({"a": 1}, {}, "it")
    with pytest.raises(ValueError, match="it has no setting 'wings'; it has steps, options$"):
        check_values({"wings": 1}, {"steps": int, "options": dict}, "it")
    with pytest.raises(ValueError, match="it: options must be a mapping or null, got 1"):
        check_values({"options": 1}, settings_of(Child.start), "it")


def test_the_nearest_name() -> None:
    assert nearest("forwardkl", ["reverse_kl", "forward_kl"]) == "forward_kl"
    assert nearest("Eagle3", ["eagle", "eagle3"]) == "eagle3"


@pytest.mark.parametrize("name", ["", "none", "nope", "1"])
def test_a_name_that_is_far_from_all_has_no_nearest(name: str) -> None:
    assert nearest(name, ["standalone", "eagle", "medusa"]) is None

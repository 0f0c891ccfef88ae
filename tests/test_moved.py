"""A module path that moved raises an error that names the new path."""

from __future__ import annotations

import importlib
import importlib.util

import pytest

from aurora_rl._moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_a_path_that_moved_names_the_new_one(old: str) -> None:
    new = f"aurora_rl.{MOVED[old]}"
    assert importlib.util.find_spec(new) is not None
    with pytest.raises(ModuleNotFoundError, match=rf"^aurora_rl\.{old} is {new} now$"):
        importlib.import_module(f"aurora_rl.{old}")
    if "." not in old:
        with pytest.raises(ModuleNotFoundError, match=rf"^aurora_rl\.{old} is {new} now$"):
            exec(f"from aurora_rl import {old}")

"""Paths of configurations: which keys are, and a leading ``~``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.config.loading import PATHS
from aurora_rl.cli.frozen import plain
from aurora_rl.cli.run_dir import make_absolute


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def value_of(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


@pytest.mark.parametrize("key", [key for key in PATHS if key != "compare"])
def test_every_path_has_the_home_folder_for_a_tilde(key: str, home: Path) -> None:
    assert value_of(load_config(overrides=[f"{key}=~/x"]), key) == f"{home}/x"
    (home / "run.yaml").write_text(f"{key}: ~/x" if "." not in key else "{}: {{{}: ~/x}}".format(*key.split(".")))
    assert value_of(load_config(home / "run.yaml"), key) == f"{home}/x"
    assert value_of(load_config(overrides=["seed=5", f"{key}=~/${{seed}}"]), key) == f"{home}/5"


def test_a_list_of_paths_and_what_is_no_path(home: Path) -> None:
    config = load_config(overrides=["compare=[~/a,eagle3]", "http.served_model_name=~mine"])
    assert config.compare == (f"{home}/a", "eagle3") and config.http.served_model_name == "~mine"


def test_paths_are_what_is_made_absolute(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    os.makedirs("x")
    pairs = [f"{key}=x" for key in PATHS if key not in ("compare", "run_dir")]
    before = load_config(overrides=pairs)
    changed = {key for key, value in flat(plain(make_absolute(before))).items() if value != flat(plain(before))[key]}
    assert changed == set(PATHS) - {"compare", "run_dir"}

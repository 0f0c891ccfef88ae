"""Keys on disk: who may read them, which are missing, and which are admitted."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from aurora_rl.collectors.keys import (
    WireKeyError,
    engine_keys,
    learner_keys,
    make_keys,
    plugin_client_keys,
    plugin_server_keys,
)


def test_secret_keys_are_their_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        written = make_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in written}
    assert modes == {"learner.key": 0o644, "learner.key_secret": 0o600, "engine.key": 0o644, "engine.key_secret": 0o600}
    assert not any("secret-key" in path.read_text() for path in written if path.suffix == ".key")


def test_keys_that_exist_are_kept_and_another_engine_is_added(tmp_path: Path) -> None:
    kept = {path: path.read_bytes() for path in make_keys(tmp_path)}
    assert [path.name for path in make_keys(tmp_path, "b")] == ["b.key", "b.key_secret"]
    assert make_keys(tmp_path, "b") == []
    assert {path: path.read_bytes() for path in kept} == kept


def test_the_ends_fit_each_other(tmp_path: Path) -> None:
    make_keys(tmp_path)
    engine, learner = engine_keys(tmp_path), learner_keys(tmp_path)
    assert engine.name == "engine" and learner.name_of(engine.public) == "engine"
    assert engine.server != engine.public and learner.name_of(engine.server) is None
    asking, plugin = plugin_client_keys(tmp_path), plugin_server_keys(tmp_path)
    assert plugin.name_of(asking.public) == "engine" and asking.server == engine.public


def test_an_engine_is_admitted_and_expelled_while_the_learner_runs(tmp_path: Path) -> None:
    make_keys(tmp_path)
    learner = learner_keys(tmp_path)
    make_keys(tmp_path / "other", "later")
    later = engine_keys(tmp_path / "other").public
    assert learner.name_of(later) is None
    shutil.copy(tmp_path / "other/engines/later.key", tmp_path / "engines")
    assert learner.name_of(later) == "later"
    (tmp_path / "engines/later.key").unlink()
    assert learner.name_of(later) is None


def test_a_broken_key_hides_no_other(tmp_path: Path) -> None:
    make_keys(tmp_path)
    learner, engine = learner_keys(tmp_path), engine_keys(tmp_path)
    (tmp_path / "engines/a.key").write_text("nothing")
    assert learner.name_of(engine.public) == "engine"
    with pytest.raises(WireKeyError, match="a.key holds no key"):
        learner.name_of(engine.server)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("spoil", "read", "says"),
    [
        (remove("learner.key_secret"), learner_keys, "learner.key_secret is missing; `aurora-rl keys"),
        (remove("engines/engine.key"), learner_keys, "engines holds no public key"),
        (remove("engines/engine.key_secret"), engine_keys, "engines holds no secret key, and an engine needs one"),
        (remove("learner.key"), engine_keys, "learner.key holds no key"),
        (lambda folder: make_keys(folder, "b"), engine_keys, "the secret keys b.key_secret, engine.key_secret"),
        (lambda folder: make_keys(folder, "b"), plugin_server_keys, "an engine needs one, its own"),
        (lambda folder: (folder / "learner.key_secret").chmod(0o640), learner_keys, "read by others; chmod 600"),
        (lambda folder: (folder / "engines/engine.key_secret").chmod(0o604), plugin_client_keys, "chmod 600"),
        (
            lambda folder: (folder / "learner.key").write_text('public-key = "short"'),
            engine_keys,
            "learner.key holds a broken key",
        ),
        (
            lambda folder: shutil.copyfile(folder / "learner.key", folder / "learner.key_secret"),
            learner_keys,
            "has no secret key",
        ),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(
    tmp_path: Path, spoil: Callable[[Path], object], read: Callable[[Path], object], says: str
) -> None:
    make_keys(tmp_path)
    spoil(tmp_path)
    with pytest.raises(WireKeyError, match=says):
        read(tmp_path)


@pytest.mark.parametrize("name", ["", "../learner", "a b", ".hidden", "learner/x"])
def test_a_name_is_that_of_a_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(WireKeyError, match="the name of an engine has letters"):
        make_keys(tmp_path, name)
    assert list(tmp_path.iterdir()) == []

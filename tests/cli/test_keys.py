"""`aurora-rl keys`, and configurations that need what it makes."""

from __future__ import annotations

from pathlib import Path

import pytest

from aurora_rl.cli.main import main


def test_keys_are_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "keys")
    assert main(["keys", folder]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{folder}/{name}"
        for name in ("learner.key", "learner.key_secret", "engines/engine.key", "engines/engine.key_secret")
    ]
    assert main(["keys", folder]) == 0
    assert capsys.readouterr().out == f"{folder} has the keys of a learner and of engine already\n"
    assert main(["keys", folder, "--engine", "b"]) == 0
    assert capsys.readouterr().out.count("\n") == 2
    assert main(["keys", folder, "--engine", "b/c"]) == 2
    assert "the name of an engine has letters" in capsys.readouterr().err


def test_a_file_and_a_key_are_no_folder_of_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["keys", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"aurora-rl: {tmp_path / 'file'} is a file; name a folder\n"
    for command in ("keys", "history", "report"):
        with pytest.raises(SystemExit):
            main([command, str(tmp_path / "none"), "engine.slots=1"])
        told = f"unrecognized argument engine.slots=1; aurora-rl {command} takes no key=value"
        assert told in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("command", ["learn", "serve", "flywheel"])
def test_a_key_that_is_missing_is_told_before_anything_is_loaded(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = [f"wire.keys={tmp_path / 'none'}", f"run_dir={tmp_path / 'run'}", "model=nowhere", "learner.nice=0"]
    assert main([command, *pairs]) == 2
    assert "aurora-rl: wire.keys: " in (said := capsys.readouterr().err) and "`aurora-rl keys " in said
    assert not (tmp_path / "run").exists()

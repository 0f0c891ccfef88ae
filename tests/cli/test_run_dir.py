"""Folders of runs: new, refused, and continued."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest

from aurora_rl.cli import run_dir
from aurora_rl.cli.config import Config, load_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.main import main
from aurora_rl.cli.run_dir import RunDir, go_on, make_absolute, resumed_config
from aurora_rl.telemetry.log import MetricsLog
from aurora_rl.training.states import add_state, states


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_dir.time, "strftime", lambda form: "20300101-000000")
    folders = [RunDir(load_config(), ["config.yaml"]) for _ in range(3)]
    assert [folder.config.run_dir for folder in folders] == [f"runs/20300101-000000{end}" for end in ("", "-2", "-3")]
    assert [str(folder.path) for folder in folders] == [folder.config.run_dir for folder in folders]


@pytest.mark.parametrize("named", [True, False])
def test_a_refused_run_leaves_no_folder_that_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    config = Config(run_dir=str(tmp_path / "runs" / "of" / "today") if named else None)
    folder = RunDir(config, ["config.yaml"])
    assert (folder.path / "config.yaml").exists()
    with pytest.raises(ConfigError), folder.undone_if_refused():
        raise ConfigError("refused")
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_others_folders_alone(tmp_path: Path) -> None:
    folder = RunDir(Config(run_dir=str(tmp_path / "runs" / "mine")), ["config.yaml"])
    (tmp_path / "runs" / "another").mkdir()
    with pytest.raises(ConfigError), folder.undone_if_refused():
        raise ConfigError("refused")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["another"]


def test_the_log_of_a_process_that_says_why_is_kept(tmp_path: Path) -> None:
    folder = RunDir(Config(run_dir=str(tmp_path / "run")), ["config.yaml"])
    (folder.path / "sglang.log").write_text("no GPU")
    with pytest.raises(OSError), folder.undone_if_refused():
        raise OSError
    assert (tmp_path / "run" / "sglang.log").exists()


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """The folder of a run that was killed after it had published."""
    config = load_config(overrides=[f"run_dir={tmp_path / 'run'}", "engine.slots=3"])
    run = RunDir(config, ["config.yaml"])
    run.close()
    folder = run.path
    for number in (1, 2):
        add_state(folder / "learner", write_state, keep=3)
        save_drafter(folder / "versions" / str(number))
    save_drafter(folder / "drafter-day0")
    return folder


def save_drafter(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def write_state(folder: Path) -> None:
    save_drafter(folder / "drafter")
    (folder / "progress.json").write_text("{}")


def test_a_run_goes_on_by_its_own_configuration(earlier: Path) -> None:
    config = resumed_config("serve", str(earlier), None, ["gate.requests=5"])
    assert (config.engine.slots, config.gate.requests, config.run_dir) == (3, 5, str(earlier))
    with contextlib.closing(RunDir(config, ["config.yaml"], resume=True)) as folder:
        config = folder.config
    assert config.run_dir == str(earlier)
    assert config.drafter.path == str(earlier / "learner" / "000002" / "drafter")
    assert config.learner.resume == str(earlier / "learner")
    # What is saved starts another run elsewhere: it names nothing of this one.
    saved = load_config(earlier / "config.yaml")
    assert (saved.gate.requests, saved.run_dir, saved.drafter.path, saved.learner.resume) == (5, None, None, None)


def test_a_broken_training_state_is_passed_over_and_of_all_of_them_one_error_tells(earlier: Path) -> None:
    newest, older = states(earlier / "learner")
    (newest / "drafter" / "config.json").write_text("{ }")
    config, broken = go_on(load_config(), earlier)
    assert broken == []
    assert (config.drafter.path, config.learner.resume) == (str(older / "drafter"), str(earlier / "learner"))
    (older / "progress.json").unlink()
    config, broken = go_on(load_config(), earlier)
    assert broken == [
        f"{newest}: drafter/config.json is not what was written",
        f"{older}: progress.json cannot be read (No such file or directory)",
    ]
    # What was published last is the start, and nothing is resumed.
    assert (config.drafter.path, config.learner.resume) == (str(earlier / "versions" / "2"), None)
    with pytest.raises(ConfigError, match="--resume .*run: no training state can be used: .*; .*; remove .*learner to"):
        RunDir(resumed_config("serve", str(earlier), None, []), ["config.yaml"], resume=True)
    assert (earlier / "config.yaml").exists() and not list(earlier.glob("part-*"))  # nothing was moved


def test_a_server_goes_on_with_what_it_served_and_not_with_what_was_on_trial(earlier: Path) -> None:
    log = MetricsLog(earlier / "metrics.jsonl", "server")

    def served() -> str | None:
        config, _ = go_on(load_config(), earlier)
        assert config.learner.resume == str(earlier / "learner")
        return config.drafter.path

    log.write("trial", version=1, against=0, requests=3)
    assert served() == str(earlier / "drafter-day0")
    log.write("swap", version=1, ms=1.0, requests=8)
    log.write("trial", version=2, against=1, requests=9)
    assert served() == str(earlier / "versions" / "1")
    log.write("swap", version=2, ms=1.0, requests=9)
    log.write("swap", version=1, ms=1.0, requests=9)  # the watchdog went back
    assert served() == str(earlier / "versions" / "1")
    shutil.rmtree(earlier / "versions" / "1")  # it is no longer kept
    assert served() == str(earlier / "learner" / "000002" / "drafter")


@pytest.mark.parametrize("command", ["serve", "flywheel", "learn"])
def test_a_run_that_goes_on_is_not_joined(earlier: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    (earlier / "learner.yaml").write_text("learner: {nice: 0}")
    going_on = RunDir(Config(run_dir=str(earlier)), resume=True)
    before = sorted(earlier.iterdir())
    assert main([command, "--resume", str(earlier)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"aurora-rl: --resume {earlier}: the run in this folder still goes on, and two would")
    assert sorted(earlier.iterdir()) == before
    going_on.close()
    RunDir(Config(run_dir=str(earlier)), ["config.yaml"], resume=True).close()


def test_each_part_keeps_its_documents(earlier: Path) -> None:
    for number in (1, 2):
        (earlier / "summary.json").write_text(f"of part {number}")
        folder = RunDir(Config(run_dir=str(earlier), seed=number), ["config.yaml", "summary.json"], resume=True)
        assert (earlier / f"part-{number}" / "summary.json").read_text() == f"of part {number}"
        assert load_config(folder.path / "config.yaml").seed == number
        folder.close()
    with pytest.raises(ConfigError), folder.undone_if_refused():
        raise ConfigError("refused")
    assert load_config(earlier / "config.yaml").seed == 1 and not (earlier / "part-2").exists()
    assert (earlier / "summary.json").read_text() == "of part 2" and (earlier / "part-1").exists()


def test_paths_mean_the_same_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_absolute(load_config(overrides=["http.api_keys=keys", "wire.keys=wire", "traffic.path=a.jsonl"]))
    found = (config.http.api_keys, config.wire.keys, config.traffic.path)
    assert found == (str(tmp_path / "keys"), str(tmp_path / "wire"), str(tmp_path / "a.jsonl"))


def test_what_cannot_go_on_says_so(earlier: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume .*nothing: there is no config.yaml in it; name the folder"):
        resumed_config("serve", str(tmp_path / "nothing"), None, [])
    with pytest.raises(ConfigError, match="--resume .*run and run_dir=elsewhere are two folders; leave run_dir out"):
        resumed_config("serve", str(earlier), None, ["run_dir=elsewhere"])


def test_a_configuration_takes_the_place_of_one_that_an_earlier_release_saved(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("control: {share: 0.1}")
    (tmp_path / "new.yaml").write_text("baseline: {share: 0.1}")
    with pytest.raises(ConfigError, match="config.yaml: 'control.share' is called 'baseline.share' now"):
        resumed_config("serve", str(tmp_path), None, [])
    assert resumed_config("serve", str(tmp_path), str(tmp_path / "new.yaml"), []).baseline.share == 0.1


def test_the_folder_of_a_training_is_resumed_by_train_alone(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("seed: 3")
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(ConfigError, match="is the folder of a training; go on with aurora-rl train --resume, or serve"):
        resumed_config("serve", str(tmp_path), None, [])
    assert resumed_config("train", str(tmp_path), None, []).seed == 3


@pytest.mark.parametrize("written", ["runs/a/drafter-day0", None])
def test_a_learner_goes_on_in_the_folder_of_a_flywheel_however_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    run, day0 = Path("runs/a"), tmp_path / "runs/a/drafter-day0"
    day0.mkdir(parents=True)
    (day0 / "config.json").write_text("{}")
    (run / "learner.yaml").write_text(f"drafter: {{path: {written or day0}}}")
    for folder in ("runs/a", "runs/a/", str(tmp_path / "runs/a")):
        config = resumed_config("learn", folder, None, [f"run_dir={tmp_path / 'runs/a'}"])
        assert config.run_dir == folder
        assert go_on(config, Path(folder))[0].drafter.path == str(day0)


@pytest.mark.parametrize("command", ["train", "serve"])
def test_a_run_goes_on_with_its_own_drafter_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "config.yaml").write_text(f"drafter: {{path: {tmp_path / 'mine'}}}")
    (tmp_path / "other.yaml").write_text("drafter: {path: another}")
    if command == "train":
        (tmp_path / "train.json").write_text("{}")
    for words, was, asked in (
        (["drafter.path=another"], f"drafter.path={tmp_path / 'mine'}", "drafter.path=another"),
        (["--config", "other.yaml"], f"drafter.path={tmp_path / 'mine'}", "drafter.path=another"),
        (["drafter.path=null"], f"drafter.path={tmp_path / 'mine'}", "drafter.path=null"),
        (["drafter.name=medusa"], "drafter.name=null", "drafter.name=medusa"),
    ):
        assert main([command, "--resume", str(tmp_path), *words]) == 2
        assert capsys.readouterr().err == (
            f"aurora-rl: --resume {tmp_path}: it was started with {was} and goes on with its own drafter, and this "
            f"command has {asked}; leave the key out, or start another run: leave --resume out and name a new run_dir\n"
        )
    assert resumed_config(command, str(tmp_path), None, ["drafter.name=null"]).drafter.name is None
    # A service that is started again by the same words goes on, also without the folder, which it needs no more.
    assert resumed_config(command, str(tmp_path), None, ["drafter.path=mine"]).drafter.path == "mine"
    (tmp_path / "mine").rmdir()
    assert resumed_config(command, str(tmp_path), None, ["drafter.path=mine"]).drafter.path == "mine"

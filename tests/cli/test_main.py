"""The command line: its configuration, help, errors of one line and exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

from aurora_rl.cli import assembly, drafter
from aurora_rl.cli import main as cli
from aurora_rl.cli.config import load_config


def test_print_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("engine: {slots: 3}\n")
    pairs = ["seed=5", "drafter.feature_layers=[1,2]"]
    assert cli.main(["serve", "--config", str(tmp_path / "mine.yaml"), "--print-config", *pairs]) == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "printed.yaml") == load_config(tmp_path / "mine.yaml", pairs)
    for words, share in (([], 0.0), (["canary.share=0.25"], 0.25)):  # a flywheel swaps at once, unless it is told
        assert cli.main(["flywheel", "--print-config", *words]) == 0
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        assert load_config(tmp_path / "printed.yaml").canary.share == share


@pytest.mark.parametrize("command", ["flywheel", "serve"])
@pytest.mark.parametrize(
    ("pair", "wrong"),
    [
        ("engine.slot=1", "unknown key 'engine.slot' in engine.slot=1; did you mean 'engine.slots'?"),
        ("max_new_tokens=0", "max_new_tokens must be at least 1 or null, got 0"),
        ("model=/no/model", "cannot load model '/no/model': no such folder"),
        ("model={broken}", "cannot load model"),
        ("traffic.path=/no/file", "cannot read requests from /no/file: No such file or directory"),
        ("traffic.path={lines}", "line 2: not valid JSON: Expecting value at character 15"),
        ("engine.max_length=1000", "engine.max_length=1000 exceeds the context of model"),
        ("drafter.path=/no/drafter", "/no/drafter is not a checkpoint"),
        ("run_dir={lines}", "lines.jsonl' cannot be used: it is a file; name a new folder where this user may write"),
        ("run_dir={lines}/run", "lines.jsonl/run' cannot be used: Not a directory; name a new folder where"),
    ],
)
def test_errors_are_one_line_and_status_2(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, pair: str, wrong: str
) -> None:
    good = '{"messages": [{"role": "user", "content": "Hi"}]}'
    files = {"lines": tmp_path / "lines.jsonl", "broken": tmp_path / "broken"}
    files["lines"].write_text(good + '\n{"messages": [')
    files["broken"].mkdir()
    (files["broken"] / "config.json").write_text('{"model_type": "llama"')
    assert cli.main([command, *arguments, "http.port=0", pair.format(**files)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aurora-rl: ")
    assert wrong in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_start_loads_what_its_command_needs_and_searches_it_for_no_garbage(tmp_path: Path) -> None:
    code = f"""if True:
        import contextlib, gc, os, sys
        from aurora_rl.cli.main import main
        for words in (["--version"], ["serve", "--help"], ["flywheel", "--print-config"], ["learn", "--help"]):
            with contextlib.redirect_stdout(None), contextlib.suppress(SystemExit):
                main(words)
        print(*{{"torch", "transformers", "huggingface_hub", "matplotlib", "zmq"}} & sys.modules.keys())
        for command in ("learn", "flywheel"):
            assert main([command, "drafter.name=no_such", "http.port=null", "run_dir={tmp_path / "run"}"]) == 2
        print(*{{"matplotlib", "starlette", "uvicorn", "prometheus_client", "openai", "tensorboard", "sglang", "scipy",
                 "sklearn", "pandas", "gymnasium", "torchvision", "torchrl.collectors"}} & sys.modules.keys())
        print("torch" in sys.modules, gc.isenabled(), gc.get_freeze_count() > 100_000, flush=True)
        os._exit(0)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "", "True True True"]
    assert [line.partition("drafter.name")[0] for line in done.stderr.splitlines()] == ["aurora-rl: "] * 2


@pytest.mark.parametrize(
    ("end", "status"), [("return 3", 3), ("sys.exit(4)", 4), ("raise KeyboardInterrupt", 130), ("1 / 0", 1)]
)
def test_a_process_waits_for_its_threads_and_takes_no_object_apart(end: str, status: int) -> None:
    code = f"""if True:
        import atexit, sys, threading, time
        from aurora_rl.cli import main as cli
        class Lasting:
            def __del__(self):
                print("taken apart")
        def main():
            atexit.register(print, "registered")
            threading.Thread(target=lambda: (time.sleep(0.2), print("joined"))).start()
            {end}
        lasting, cli.main = Lasting(), main
        cli.program()
    """
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=buffered)
    assert (done.returncode, done.stdout.split()) == (status, ["joined", "registered"])
    assert done.stderr.strip().rpartition("\n")[2] == ("ZeroDivisionError: division by zero" if status == 1 else "")


def test_traffic_without_room_is_refused_by_the_command_that_serves_it(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["flywheel", *arguments, "http.port=0", "engine.max_length=50"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("aurora-rl: ") and "that exceeds engine.max_length=50" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"aurora-rl {version('aurora-rl')}\n"


def test_every_command_has_help_and_its_pairs(capsys: pytest.CaptureFixture[str]) -> None:
    parts = {"bench": ["objectives"], "drafter": ["init"], "sglang": ["attach"], "vllm": ["attach"]}
    for name, command in cli.COMMANDS.items():
        with pytest.raises(SystemExit) as error:
            cli.main([name, *parts.get(name, []), "--help"])
        assert error.value.code == 0
        text = capsys.readouterr().out
        assert ("key=value" in text) == (name not in ("report", "history", "keys"))  # which have no configuration
        assert name in parts or command.help.split()[0] in text


def test_a_leading_tilde_of_an_option_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 5\n")
    assert cli.main(["serve", "--config=~/mine.yaml", "--print-config"]) == 0
    assert "seed: 5\n" in capsys.readouterr().out
    assert cli.main(["train", "--recording=~/a", "--resume=~/run"]) == 2
    assert f"--resume {tmp_path}/run: there is no config.yaml" in capsys.readouterr().err
    assert cli.main(["history", "~/run"]) == 2
    assert f"{tmp_path}/run" in capsys.readouterr().err


def test_a_key_written_as_an_option_is_told_how_to_write_it(capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["--slots", "2"], ["--slots=2"], ["--engine.slots", "2"]):
        with pytest.raises(SystemExit) as error:
            cli.main(["serve", *option])
        assert error.value.code == 2
        assert "keys are set without dashes, such as engine.slots=2" in capsys.readouterr().err


def test_options_may_stand_between_pairs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("max_new_tokens: 7")
    words = ["seed=1", "--config", str(tmp_path / "mine.yaml"), "engine.slots=3", "--print-config", "seed=2", "top_k=5"]
    for command in (["serve"], ["drafter", "init", "--out", "d0"], ["drafter", "inspect", "d0"]):
        assert cli.main([*command, *words]) == 0
        (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
        config = load_config(tmp_path / "printed.yaml")
        assert (config.seed, config.engine.slots, config.top_k, config.max_new_tokens) == (2, 3, 5, 7)
    assert cli.main(["serve", "seed=1", "--print-config", "stray"]) == 2
    assert "expected key=value, got 'stray'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["flywheel", "serve", "learn"])
def test_a_folder_that_holds_something_is_refused_and_left_alone(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr(assembly, "load", lambda spec: pytest.fail("a model was loaded"))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text("of an earlier run")
    assert cli.main([command, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"run_dir={str(tmp_path / 'run')!r} is not empty" in line and "name a new folder" in line
    assert line.endswith(f"or go on with that run: --resume {tmp_path / 'run'}")
    assert [path.read_text() for path in (tmp_path / "run").iterdir()] == ["of an earlier run"]


def test_an_error_without_a_run_folder_leaves_its_traceback_in_a_temporary_file(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(drafter, "resolve", lambda config: {}["missing"])
    pairs = [pair for pair in arguments if not pair.startswith("run_dir")]
    assert cli.main(["drafter", "init", "--out", str(tmp_path / "b"), *pairs]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    start, _, path = line.partition("; the traceback is in ")
    assert start == "aurora-rl: KeyError: 'missing'"
    assert Path(path).is_relative_to(tmp_path) and "Traceback" in Path(path).read_text()


def test_a_command_that_moved_names_the_new_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", "--drafter", "a", "--out", "b", "--to", "vllm"]) == 2
    assert capsys.readouterr().err == "aurora-rl: `aurora-rl export` is called `aurora-rl drafter export` now\n"

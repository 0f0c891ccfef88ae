"""Arguments that several commands take."""

from __future__ import annotations

import argparse

import pytest

from aurora_rl.cli.arguments import add_config_arguments, add_resume_argument, pair_of
from aurora_rl.cli.main import main


def test_pairs_files_and_folders_are_told_apart() -> None:
    parser = argparse.ArgumentParser()
    add_resume_argument(parser, "what was learned")
    add_config_arguments(parser, "engine.slots=7")
    nothing = vars(parser.parse_args([]))
    assert nothing == {"resume": None, "config": None, "print_config": False, "overrides": []}
    words = ["--resume", "runs/a", "seed=1", "model=x", "--config", "mine.yaml", "--print-config"]
    assert vars(parser.parse_args(words)) == {
        "resume": "runs/a",
        "config": "mine.yaml",
        "print_config": True,
        "overrides": ["seed=1", "model=x"],
    }
    assert "for example engine.slots=7" in parser.format_help()
    assert "with its configuration and what was learned" in " ".join(parser.format_help().split())


@pytest.mark.parametrize("command", [["serve"], ["flywheel"], ["learn"], ["train"], ["sglang", "attach"]])
def test_a_command_says_what_resuming_is_for_it(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "go on in the folder of an earlier run, with its configuration and" in told
    assert ("traffic starts anew" in told) == (command == ["flywheel"])
    assert ("part-1" in told) == (command != ["train"])


def test_the_last_pair_of_a_key_counts() -> None:
    words = ["drafter.path=a", "drafter.path_=b", "drafter.path=c=d", "seed=1"]
    assert pair_of("drafter.path", words) == "drafter.path=c=d" and pair_of("drafter", words) is None

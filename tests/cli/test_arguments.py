"""Arguments that several commands take."""

from __future__ import annotations

import argparse

from aurora_rl.cli.arguments import add_config_arguments, add_resume_argument, pair_of


def test_pairs_files_and_folders_are_told_apart() -> None:
    parser = argparse.ArgumentParser()
    add_resume_argument(parser)
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


def test_the_last_pair_of_a_key_counts() -> None:
    words = ["drafter.path=a", "drafter.path_=b", "drafter.path=c=d", "seed=1"]
    assert pair_of("drafter.path", words) == "drafter.path=c=d" and pair_of("drafter", words) is None

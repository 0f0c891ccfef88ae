"""``aurora-rl keys``: make the keys that encrypt the wire and say who may use it."""

from __future__ import annotations

import argparse

from aurora_rl.cli.arguments import add_no_config_arguments
from aurora_rl.cli.config import Config
from aurora_rl.cli.signals import Stop


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", help="folder of the keys, for wire.keys=FOLDER; keys that it holds stay as they are")
    parser.add_argument("--engine", metavar="NAME", default="engine", help="name of the engine; run it once for each")
    add_no_config_arguments(parser)


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Make the keys that are missing. Returns the exit status."""
    from aurora_rl.collectors.keys import make_keys

    written = make_keys(arguments.folder, arguments.engine)
    for path in written:
        print(path)
    if not written:
        print(f"{arguments.folder} has the keys of a learner and of {arguments.engine} already")
    return 0

"""``aurora-rl bench adaptation | objectives``: comparisons of what drafters learn."""

from __future__ import annotations

import argparse

from aurora_rl.cli import bench_adaptation, bench_objectives
from aurora_rl.cli.config import Config
from aurora_rl.cli.signals import Stop

_BENCHES = {"adaptation": bench_adaptation, "objectives": bench_objectives}


def register(parser: argparse.ArgumentParser) -> None:
    """Add the commands' arguments."""
    commands = parser.add_subparsers(dest="what", required=True)
    for name, bench in _BENCHES.items():
        bench.register(commands.add_parser(name, help=bench.HELP, description=bench.HELP))


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Run one of them. Returns the exit status."""
    return _BENCHES[arguments.what].run(config, arguments, stop)

"""``aurora-rl export``: write a drafter as an engine loads it."""

from __future__ import annotations

import argparse
from pathlib import Path

from aurora_rl.cli.arguments import add_config_arguments
from aurora_rl.cli.config import Config
from aurora_rl.cli.signals import Stop


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--drafter", required=True, help="folder such as RUN_DIR/drafter, or hub id")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a drafter in it is replaced")
    parser.add_argument("--to", required=True, help="sglang, vllm, hf (its authors' own), or another of its formats")
    parser.add_argument("--from", dest="layout", help="layout of what is read; the one of run folders by default")
    add_config_arguments(parser, "model=..., the target")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Write the drafter. Returns the exit status."""
    from aurora_rl.cli.spec import load, resolve
    from aurora_rl.policies import get_drafter, load_drafter, save_drafter

    # Sizes and positions are checked against the target, and written as the target has them.
    spec = resolve(config)
    target = load(spec)
    settings = config.drafter
    # Drafters that have names recognize their folders. Of others only the user may say what is imported.
    kind = get_drafter(settings.name) if ":" in settings.name else None
    drafter = load_drafter(
        arguments.drafter,
        target.parts,
        kind,
        layout=arguments.layout,
        options=settings.options,
        made_for=settings.made_for,
    )
    save_drafter(drafter.to(spec.dtype), arguments.out.resolve(), arguments.to)
    print(f"{type(drafter).__name__} for {config.model} written to {arguments.out} ({arguments.to})")
    return 0

"""``aurora-rl sglang`` and ``aurora-rl vllm``: learn from the traffic of a running server, tell its status, detach."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from aurora_rl.cli import serve
from aurora_rl.cli.arguments import SAVED_LAST, add_config_arguments, add_resume_argument
from aurora_rl.cli.config import Config
from aurora_rl.cli.config.checks import check_config
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.signals import Stop
from aurora_rl.remote_engines import EXAMPLES, REMOTE_ENGINES, address_variable


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    engine = REMOTE_ENGINES[parser.prog.rpartition(" ")[2]]
    commands = parser.add_subparsers(dest="what", required=True)

    text = f"learn from what a running {engine} answers its clients, and swap its drafter, until stopped"
    attach = commands.add_parser("attach", help=text, description=text)
    add_resume_argument(attach, SAVED_LAST)
    add_config_arguments(attach, f"drafter.path=DRAFTER, the folder that {engine} was started with")
    # Clients talk to the engine itself, unless a front is asked for; and it takes new weights at once.
    attach.set_defaults(usual=["http.port=null", "canary.share=0"])

    for name, text in (
        ("detach", f"end recording and swaps; {engine} serves on with the weights that it has"),
        ("status", "print the plugin's status as JSON"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text}; exit status 1 if {engine} does not answer")
        add_config_arguments(command, f"engine.plugin_address={EXAMPLES[engine][1]}")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Run one of the three. Returns the exit status."""
    engine, name = config.engine, REMOTE_ENGINES[arguments.command]
    if engine.plugin_address is None:
        raise ConfigError(
            f"engine.plugin_address is missing: set it to the value of {address_variable(name)} in {name}'s environment"
        )
    if arguments.what != "attach":
        return _ask(engine.plugin_address, arguments.what, config, name)
    if engine.url is None:
        raise ConfigError(f"engine.url is missing: set it to {name}'s own, such as engine.url={EXAMPLES[name][0]}")
    config = replace(config, engine=replace(engine, name=arguments.command))
    check_config(config)
    return serve.run(config, arguments, stop)


def _ask(address: str, kind: str, config: Config, engine: str) -> int:
    from aurora_rl.cli.assembly import wire_keys
    from aurora_rl.collectors.keys import plugin_client_keys
    from aurora_rl.envs.remote.plugin_server import PluginError
    from aurora_rl.envs.remote.replicas import ask_all

    try:
        status = ask_all(address, kind, engine=engine, keys=wire_keys(config, plugin_client_keys))
    except PluginError as error:
        print(f"aurora-rl: {error}", file=sys.stderr)
        return 1
    print(json.dumps(status, indent=2))
    return 0

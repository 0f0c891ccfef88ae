"""``aurora-rl sglang attach | detach | status``: learn from the traffic that a running SGLang serves."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from aurora_rl.cli import serve
from aurora_rl.cli.arguments import add_config_arguments, add_resume_argument
from aurora_rl.cli.config import Config
from aurora_rl.cli.config_checks import check
from aurora_rl.cli.errors import ConfigError
from aurora_rl.cli.signals import Stop


def register(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    commands = parser.add_subparsers(dest="what", required=True)

    text = "learn from what a running SGLang answers its clients, and swap its drafter, until stopped"
    attach = commands.add_parser("attach", help=text, description=text)
    add_resume_argument(attach)
    add_config_arguments(attach, "drafter.path=DRAFTER, the folder that SGLang was started with")
    # Clients talk to SGLang itself, unless a front is asked for; and it takes new weights at once.
    attach.set_defaults(usual=["http.port=null", "canary.share=0"])

    for name, text in (
        ("detach", "end recording and swaps; SGLang serves on with the weights that it has"),
        ("status", "print the plugin's status as JSON"),
    ):
        command = commands.add_parser(name, help=text, description=f"{text}; exit status 1 if SGLang does not answer")
        add_config_arguments(command, "engine.plugin_address=tcp://127.0.0.1:5560")


def run(config: Config, arguments: argparse.Namespace, stop: Stop) -> int:
    """Run one of the three. Returns the exit status."""
    engine = config.engine
    if engine.plugin_address is None:
        raise ConfigError(
            "engine.plugin_address is missing: set it to the value of AURORA_RL_SGLANG in SGLang's environment"
        )
    if arguments.what != "attach":
        return _ask(engine.plugin_address, arguments.what, config)
    if engine.url is None:
        raise ConfigError("engine.url is missing: set it to SGLang's own, such as engine.url=http://127.0.0.1:30000")
    config = replace(config, engine=replace(engine, name="sglang"))
    check(config)
    return serve.run(config, arguments, stop)


def _ask(address: str, kind: str, config: Config) -> int:
    """Ask the plugin, and print its status."""
    from aurora_rl.cli.assembly import wire_keys
    from aurora_rl.collectors.keys import plugin_client_keys
    from aurora_rl.envs.recording.plugin_server import PluginError, ask

    try:
        status = ask(address, kind, engine="SGLang", keys=wire_keys(config, plugin_client_keys))
    except PluginError as error:
        print(f"aurora-rl: {error}", file=sys.stderr)
        return 1
    print(json.dumps(status, indent=2))
    return 0

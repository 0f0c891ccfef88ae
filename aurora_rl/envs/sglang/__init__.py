"""SGLang as the serving engine, unpatched.

Inside SGLang's scheduler process: :mod:`plugin` (hooks), :mod:`requests` (which are recorded), :mod:`swaps` (of
weights, on all :mod:`ranks` alike), :mod:`weights` (how they are loaded), :mod:`watchdog` and :mod:`refusals`.
Outside: :mod:`client` (a server, launched or attached to). What other engines do alike is in
:mod:`aurora_rl.envs.remote`, and :mod:`aurora_rl.serving.attached` follows a server, or keeps its slots filled.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from aurora_rl.remote_engines import REMOTE_ENGINES, address_variable, keys_variable

if TYPE_CHECKING:
    from aurora_rl.envs.sglang.client import SGLangClient, SGLangError

__all__ = ["ENGINE", "LEARNED", "SGLangClient", "SGLangError", "register"]

ENGINE = REMOTE_ENGINES["sglang"]
"""Name of the engine; the environment variables of its processes are AURORA_RL_SGLANG and AURORA_RL_SGLANG_KEYS."""
LEARNED = ("EAGLE3", "EAGLE")
"""SGLang's algorithms whose drafters learn while it serves: the plugin records their rounds and swaps their weights."""


def register() -> None:
    """Register the hooks if the environment asks for them. SGLang calls this in each process, as its plugin."""
    if not (address := os.environ.get(address_variable(ENGINE))):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from aurora_rl.envs.sglang.plugin import Plugin

    for target, hook in Plugin(address, os.environ.get(keys_variable(ENGINE))).hooks().items():
        HookRegistry.register(target, hook, HookType.AROUND)


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: each of SGLang's processes imports this module and needs none of it."""
    if name in ("SGLangClient", "SGLangError"):
        from aurora_rl.envs.sglang import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""vLLM as the serving engine, unpatched.

Inside vLLM: :mod:`scheduler_notes` (what the scheduler's process tells the worker), :mod:`plugin` (hooks of the worker)
and :mod:`hooking` (how they are put in). Also :mod:`requests` (which are recorded), :mod:`batches` (parts of batches to
rounds), :mod:`weights` (swaps) and :mod:`refusals`. Outside: :mod:`client` (a server, launched or attached to). Code
that engines share is in :mod:`aurora_rl.envs.remote`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aurora_rl.remote_engines import REMOTE_ENGINES, address_variable, keys_variable

if TYPE_CHECKING:
    from aurora_rl.envs.vllm.client import VLLMClient, VLLMError

__all__ = ["ENGINE", "LEARNED", "VLLMClient", "VLLMError", "register"]

ENGINE = REMOTE_ENGINES["vllm"]
"""Name of the engine; the environment variables of its processes are AURORA_RL_VLLM and AURORA_RL_VLLM_KEYS."""
LEARNED = ("eagle3",)
"""vLLM's methods whose drafters learn while it serves: the plugin records their rounds and swaps their weights."""


def register() -> None:
    """Put the hooks in place if the environment asks for them. vLLM calls this in each process, as a general plugin."""
    if not (address := os.environ.get(address_variable(ENGINE))):
        return
    from vllm.config import SchedulerConfig
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    from aurora_rl.envs.vllm.hooking import wrap
    from aurora_rl.envs.vllm.scheduler_notes import SchedulerNotes

    def on_worker(original: Callable, *args: Any, **kwargs: Any) -> Any:
        from aurora_rl.envs.vllm.plugin import Plugin  # workers only: it imports what recording needs

        return Plugin(address, os.environ.get(keys_variable(ENGINE))).on_worker(original, *args, **kwargs)

    # The classes that serve are not imported yet, and most processes import neither: both are met when they are made.
    wrap(SchedulerConfig, "get_scheduler_cls", SchedulerNotes().on_class)
    wrap(WorkerWrapperBase, "initialize_from_config", on_worker)


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: each of vLLM's processes imports this module and needs none of it."""
    if name in ("VLLMClient", "VLLMError"):
        from aurora_rl.envs.vllm import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

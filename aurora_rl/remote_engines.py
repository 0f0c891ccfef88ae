"""Engines that are servers of their own, by the names that ``engine.name`` has for them. Imports nothing heavy."""

from __future__ import annotations

REMOTE_ENGINES = {"sglang": "SGLang", "vllm": "vLLM"}
"""How they are called in messages, by ``engine.name``."""
EXAMPLES = {
    "SGLang": ("http://127.0.0.1:30000", "tcp://127.0.0.1:5560"),
    "vLLM": ("http://127.0.0.1:8000", "tcp://127.0.0.1:5561"),
}
"""URL of a server and address of its plugin, as in examples."""


def address_variable(engine: str) -> str:
    """Return the environment variable of an engine's processes with the address at which its plugin answers.

    Example:
        >>> address_variable("SGLang"), keys_variable("vLLM")
        ('AURORA_RL_SGLANG', 'AURORA_RL_VLLM_KEYS')
    """
    return f"AURORA_RL_{engine.upper()}"


def keys_variable(engine: str) -> str:
    """Return the environment variable with the folder of an engine's keys; without it, all is on this host."""
    return f"{address_variable(engine)}_KEYS"

"""What engines in processes of their own share, whose rounds reach us as recorded: SGLang and vLLM.

Inside the engine: :mod:`assembler` (rounds to trajectories), :mod:`session` (what an attached learner has there) and
:mod:`plugin_server` (how it is attached). What knows an engine's own functions is in ``envs/sglang`` and ``envs/vllm``.
"""


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

"""The environment with vLLM: where its Python is, and what its processes need on a CPU."""

import os
from pathlib import Path

import pytest

PYTHON = Path(os.environ.get("AURORA_RL_VLLM_PYTHON", Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"))
VARIABLES = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # otherwise threads are bound to the cores that it finds, all of them
    "VLLM_NO_USAGE_STATS": "1",
}


def require() -> None:
    """Skip the test if there is no such environment, or fail it where vLLM is required."""
    if PYTHON.exists():
        return
    reason = f"{PYTHON} is missing; `make vllm` makes an environment with vLLM"
    if "vllm" in os.environ.get("AURORA_RL_REQUIRE", "").split(","):
        pytest.fail(f"AURORA_RL_REQUIRE asks for vllm: {reason}")
    pytest.skip(reason)

"""Names of the engines that are servers of their own."""

from aurora_rl.remote_engines import REMOTE_ENGINES, address_variable, keys_variable


def test_each_engine_has_variables_of_its_own() -> None:
    names = [variable(engine) for engine in REMOTE_ENGINES.values() for variable in (address_variable, keys_variable)]
    assert names == ["AURORA_RL_SGLANG", "AURORA_RL_SGLANG_KEYS", "AURORA_RL_VLLM", "AURORA_RL_VLLM_KEYS"]

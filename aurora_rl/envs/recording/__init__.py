"""What engines in processes of their own share, whose rounds reach us as recorded: SGLang and vLLM.

Inside the engine: :mod:`assembler` (rounds to trajectories), :mod:`session` (what an attached learner has there) and
:mod:`plugin_server` (how it is attached). What knows an engine's own functions is in ``envs/sglang`` and ``envs/vllm``.
"""

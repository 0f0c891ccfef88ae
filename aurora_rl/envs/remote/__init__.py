"""Code that remote engines share, engines in processes of their own: SGLang and vLLM.

Inside the engine: :mod:`plugin` (what every plugin answers), :mod:`plugin_server` (by which socket), :mod:`session`
(what an attached learner has there) and :mod:`checks` (whether target and weights fit). Also :mod:`assembler` (rounds
to trajectories), :mod:`feature_store` (of prefixes), :mod:`recorded_totals` (sums) and :mod:`copies` (tensors to the
host). Outside: :mod:`client` (a server) and :mod:`replicas` (several of one). Code that knows an engine's own functions
is in ``envs/sglang`` and ``envs/vllm``.
"""

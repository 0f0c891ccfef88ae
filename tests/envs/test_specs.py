"""The specs of the environment: shapes, and what only some rules need."""

from __future__ import annotations

from aurora_rl.envs import TransformersEngine
from aurora_rl.envs.specs import specs
from aurora_rl.testing import tiny_target


def test_shapes_follow_the_engine_and_the_trees() -> None:
    engine = TransformersEngine(tiny_target(), num_slots=3, max_length=32, feature_layers=(0, 1))
    observation, action = specs(engine, 4, needs_q=False)
    assert observation["observation", "tokens"].shape == (3, 5)
    assert observation["observation", "features"].shape == (3, 5, engine.store.features.shape[-1])
    assert observation["verifier", "accepted"].shape == action["draft", "mask"].shape == (3, 4)
    assert "q" not in action["draft"].keys()
    _, with_q = specs(engine, 4, needs_q=True)
    assert with_q["draft", "q"].shape == (3, 4, engine.vocab_size)
    assert observation.is_in(observation.rand()) and with_q.is_in(with_q.zero())

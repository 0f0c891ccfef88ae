"""What is checked of a drafter's config.json; tests of whole folders are in test_files.py."""

from __future__ import annotations

import pytest

from aurora_rl.models.parts import layer_config
from aurora_rl.policies import TargetParts
from aurora_rl.policies.formats.checks import settle_attention
from aurora_rl.testing import tiny_target


def test_a_checkpoint_whose_positions_depend_on_the_pass_is_refused() -> None:
    parts = TargetParts.of(tiny_target())
    config = layer_config(parts)
    config.rope_parameters = {"rope_type": "longrope", "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope_type is 'longrope', which turns keys by the length of the pass"):
        settle_attention(config, {}, parts, "own")

"""Layouts of servers that are refused."""

from __future__ import annotations

from typing import Any

import pytest

from aurora_rl.envs.sglang.refusals import layout_fault

ONE = {
    "tp_size": 1, "pp_size": 1, "enable_dp_attention": False, "attn_cp_size": 1, "moe_a2a_backend": "none",
    "speculative_token_map": None, "speculative_algorithm": "EAGLE3",
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"pp_size": 2}, "pp_size=2 is not supported: no rank has the whole"),
        ({"tp_size": 2, "enable_dp_attention": True}, "enable_dp_attention is not supported"),
        ({"attn_cp_size": 2}, "attn_cp_size=2 is not supported"),
        ({"tp_size": 2, "moe_a2a_backend": "deepep"}, "moe_a2a_backend='deepep' is not supported with tp_size=2"),
        (
            {"tp_size": 2, "speculative_algorithm": "EAGLE", "speculative_token_map": "map.pt"},
            "EAGLE with a reduced vocabulary is not supported with tp_size=2",
        ),
    ],
)
def test_layouts_that_cannot_be_learned_from_are_named(changed: dict[str, Any], reason: str) -> None:
    assert layout_fault({**ONE, **changed}).startswith(reason)


@pytest.mark.parametrize(
    "changed", [{}, {"tp_size": 8}, {"speculative_algorithm": "EAGLE", "speculative_token_map": "m"}]
)
def test_other_layouts_are_not(changed: dict[str, Any]) -> None:
    assert layout_fault({**ONE, **changed}) == ""

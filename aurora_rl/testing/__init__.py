"""Tiny models and conformance checks, for this project's tests and for third parties' parts."""

from aurora_rl.testing.drafters import check_drafter
from aurora_rl.testing.engines import check_engine
from aurora_rl.testing.objectives import check_objective
from aurora_rl.testing.tiny import serve, tiny_batch, tiny_folder, tiny_target, tiny_trajectory
from aurora_rl.testing.variants import topk_form

__all__ = [
    "check_drafter",
    "check_engine",
    "check_objective",
    "serve",
    "tiny_batch",
    "tiny_folder",
    "tiny_target",
    "tiny_trajectory",
    "topk_form",
]

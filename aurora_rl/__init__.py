"""Speculative decoding that learns while it serves.

The names below are imported when they are first used, so that ``import aurora_rl`` loads no torch.
"""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from aurora_rl._moved import MovedModules

if TYPE_CHECKING:
    from aurora_rl.envs import Completion, Request, SpecDecodeEnv, TransformersEngine
    from aurora_rl.llm import LLM, Chunk
    from aurora_rl.objectives import Objective, make_objectives, register_objective
    from aurora_rl.policies import Drafter, DrafterPolicy, Eagle3Drafter, TargetParts, TreeShape, get_drafter
    from aurora_rl.sampling_params import SamplingParams

    __version__: str

_HOMES = {
    "aurora_rl.envs": ("Completion", "Request", "SpecDecodeEnv", "TransformersEngine"),
    "aurora_rl.llm": ("LLM", "Chunk"),
    "aurora_rl.objectives": ("Objective", "make_objectives", "register_objective"),
    "aurora_rl.policies": ("Drafter", "DrafterPolicy", "Eagle3Drafter", "TargetParts", "TreeShape", "get_drafter"),
    "aurora_rl.sampling_params": ("SamplingParams",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "LLM",
    "Chunk",
    "Completion",
    "Drafter",
    "DrafterPolicy",
    "Eagle3Drafter",
    "Objective",
    "Request",
    "SamplingParams",
    "SpecDecodeEnv",
    "TargetParts",
    "TransformersEngine",
    "TreeShape",
    "__version__",
    "get_drafter",
    "make_objectives",
    "register_objective",
]

if not any(isinstance(finder, MovedModules) for finder in sys.meta_path):  # as after a reload
    sys.meta_path.insert(0, MovedModules())


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("aurora-rl")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)

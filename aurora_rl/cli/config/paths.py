"""Paths among the keys of a configuration."""

from __future__ import annotations

import os
from collections.abc import Collection

from omegaconf import DictConfig, OmegaConf

PATHS = (
    "model", "traffic.path", "drafter.path", "http.api_keys", "wire.keys", "learner.resume", "learner.recording",
    "compare", "run_dir",
)  # fmt: skip
"""Keys whose value is a path, or a list of paths. Some take other names too, none of which begins with a tilde."""


def expand_home(merged: DictConfig, named: Collection[str]) -> None:
    """Replace a leading ``~`` of every path: a shell leaves it as it is after ``key=``, and in a YAML file."""
    for key in PATHS:
        value = OmegaConf.select(merged, key)
        if isinstance(value, str):
            OmegaConf.update(merged, key, os.path.expanduser(value))
        elif value is not None:
            OmegaConf.update(merged, key, [os.path.expanduser(each) for each in value])

"""OmegaConf's tree of a configuration: its keys, its nodes, and values of the wrong type."""

from __future__ import annotations

import contextlib
import json
from typing import Any, get_args

from omegaconf import DictConfig, ListConfig, OmegaConf, TupleConfig
from omegaconf.errors import OmegaConfBaseException

MAX_SHOWN = 80
"""Most characters of a wrong key, value or file that an error shows."""
_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_LISTS = {"compare": "[eagle3,medusa]", "objectives": "[{name: imitation}]"}  # examples where one element is too few
_OWN_KEYS = ("drafter.options", "fleet.engines", "fleet.learner")  # mappings whose keys the schema does not have


def node_at(config: DictConfig, key: str) -> Any:
    """Return the node at ``key``, or None if there is none. Interpolations are not followed."""
    node: Any = config
    for part in key.split("."):
        node = node._get_node(part, validate_access=False) if isinstance(node, DictConfig) else None
    return node


def keys_of(config: DictConfig, prefix: str = "") -> list[str]:
    """Return the keys of all values, each with ``prefix`` before it. A mapping of the user's own is one value."""
    keys: list[str] = []
    for name in config:
        value = config._get_node(name)
        key = f"{prefix}{name!s}"
        if isinstance(value, DictConfig) and len(value) and key not in _OWN_KEYS:
            keys += keys_of(value, key + ".")
        else:
            keys.append(key)
    return keys


def wrong_type(values: DictConfig, merged: DictConfig) -> str:
    """Return which key has a value of another type, the value, and what to write; empty if none has."""
    for key in keys_of(values):
        wanted, node = node_at(merged, key), node_at(values, key)
        value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
        with contextlib.suppress(OmegaConfBaseException, TypeError):
            OmegaConf.update(merged, key, value)
            continue
        got = f"{key} is {_shown(value)}"
        if isinstance(wanted, DictConfig):
            return f"{got}; give a mapping, such as {key}={{NAME: VALUE}}"
        if not isinstance(wanted, TupleConfig):
            return f"{got}; give {_TYPES[wanted._metadata.ref_type]}{' or null' * wanted._is_optional()}"
        kind = get_args(wanted._metadata.ref_type)[0]
        if not isinstance(value, list) or kind not in (int, str):
            example = _LISTS.get(key, f"[{'' if value is None else value}]")
            return f"{got}; give a list, such as {key}={example}"
        need = "two names or folders" if key == "compare" else "integers" if kind is int else "texts"
        if wrong := [each for each in value if type(each) is not kind]:
            return f"{key} holds {_shown(wrong[0])}; give {need}"
    return ""


def nested(values: DictConfig, merged: DictConfig) -> str:
    """Return which list of integers or texts holds a list or a mapping, which OmegaConf lets through; empty if none."""
    for key in keys_of(values):
        wanted, node = node_at(merged, key), node_at(values, key)
        if not isinstance(wanted, TupleConfig) or not isinstance(node, ListConfig):
            continue
        kind = get_args(wanted._metadata.ref_type)[0]
        for index in range(len(node)) if kind in (int, str) else ():
            if OmegaConf.is_config(each := node._get_node(index)):
                held = _shown(OmegaConf.to_container(each))
                return f"{key} holds {held}; give {'integers' if kind is int else 'texts'}"
    return ""


def _shown(value: Any) -> str:
    return repr(value)[:MAX_SHOWN] if isinstance(value, str) else json.dumps(value, default=str)[:MAX_SHOWN]

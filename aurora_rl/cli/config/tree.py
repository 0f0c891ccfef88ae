"""OmegaConf's tree of a configuration: its keys, its nodes, and values of the wrong type."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from typing import Any, get_args

from omegaconf import AnyNode, DictConfig, ListConfig, OmegaConf, StringNode, TupleConfig
from omegaconf.errors import OmegaConfBaseException

from aurora_rl.settings import nearest

MAX_SHOWN = 80
"""Most characters of a wrong key, value or file that an error shows."""
MAX_NAMED = 3
"""Most similar keys that an error names."""
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


def unfolded(values: DictConfig, merged: DictConfig) -> DictConfig:
    """Return the values of a file with ``engine.slots: 2`` as ``engine: {slots: 2}``, and without empty sections.

    Raises:
        ValueError: A key is given in both ways.
    """
    tree: Any = OmegaConf.to_container(values)
    for key, value in list(tree.items()):
        *sections, last = str(key).split(".")
        if sections and all((*sections, last)):
            del tree[key]
            inner = tree
            for section in sections:
                inner[section] = inner.get(section) if inner.get(section) is not None else {}
                inner = inner[section]
                if not isinstance(inner, dict):
                    raise ValueError(f"{key} is given, and {section} is {_shown(inner)}; leave one of them out")
            if last in inner:
                raise ValueError(f"{key} is given twice, nested and as {key}; leave one of them out")
            inner[last] = value
    return OmegaConf.create(_without_empty(tree, merged))


def _without_empty(tree: dict[Any, Any], known: DictConfig) -> dict[Any, Any]:
    """Return what a file has without its empty sections: that is what is left once all their keys are commented out."""
    kept = {}
    for name, value in tree.items():
        section = known._get_node(name) if name in known else None
        if isinstance(section, DictConfig) and isinstance(value, dict | None):
            value = _without_empty(value or {}, section) if len(section) else value
            if not value:
                continue
        kept[name] = value
    return kept


def similar(name: str, known: Sequence[str]) -> list[str]:
    """Return the keys that a user may have meant by ``name``: ``slots`` is ``engine.slots``, and ``lr`` any rate."""
    if f"{name}.name" in known:
        return [f"{name}.name"]
    section, _, last = name.rpartition(".")
    if section in known:  # engine.slots.more
        return [section]
    lasts = {key: key.rpartition(".")[2] for key in known}
    within = [key for key in known if section and key.startswith(f"{section}.")]
    for keys in (within, known):
        for fits in (last.__eq__, lambda each: each.endswith(f"_{last}")):
            if last and (found := [key for key in keys if fits(lasts[key])]):
                return found
        if near := nearest(last, [lasts[key] for key in keys]):
            return [key for key in keys if lasts[key] == near]
    # The shared section alone would make engine.xx similar to engine.url.
    return [near] if not within and (near := nearest(name, known)) else []


def unknown_key(key: str, values: DictConfig, merged: DictConfig, source: str, equals: str) -> str:
    """Return what is wrong with an unknown key of ``source``, a file or a pair, and what to write.

    ``merged`` has all keys. ``equals`` stands between key and value in the source: ``=`` or ``: ``.
    """
    node = node_at(values, key)
    value = node._value() if isinstance(node, StringNode | AnyNode) else None
    text = value if isinstance(value, str) else ""  # drafter=eagle3
    section, known = node_at(merged, key), keys_of(merged)
    if isinstance(section, DictConfig) and not (text and f"{key}.name" in known):
        first = next(map(str, section))
        return f"{key} in {source} is a section of keys, not a value; set its keys, such as {key}.{first}{equals}VALUE"
    found = [f"{each}{equals}{text}" if each == f"{key}.name" else each for each in similar(key, known)]
    told = f"unknown key {key[:MAX_SHOWN]!r} in {source}; "
    if found:
        return f"{told}did you mean {' or '.join(map(repr, found[:MAX_NAMED]))}?"
    section = node_at(merged, key.rpartition(".")[0])
    if isinstance(section, DictConfig):
        return f"{told}{key.rpartition('.')[0]} has {', '.join(map(str, section))}"
    return f"{told}aurora-rl serve --print-config prints all keys"


def wrong_type(values: DictConfig, merged: DictConfig, equals: str) -> str:
    """Return which key has a value of another type, the value, and what to write; empty if none has."""
    for key in keys_of(values):
        wanted, node = node_at(merged, key), node_at(values, key)
        value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node._value()
        with contextlib.suppress(OmegaConfBaseException, TypeError):
            OmegaConf.update(merged, key, value)
            continue
        got = f"{key} is {_shown(value)}"
        if isinstance(wanted, DictConfig):
            return f"{got}; give a mapping, such as {key}{equals}{{NAME: VALUE}}"
        if not isinstance(wanted, TupleConfig):
            return f"{got}; give {_TYPES[wanted._metadata.ref_type]}{' or null' * wanted._is_optional()}"
        kind = get_args(wanted._metadata.ref_type)[0]
        example = _LISTS.get(key, f"[{'' if value is None else value}]")
        if not isinstance(value, list):
            return f"{got}; give a list, such as {key}{equals}{example}"
        if kind not in (int, str):
            wrong = next(each for each in value if not isinstance(each, dict))
            return f"{key} holds {_shown(wrong)}; give mappings, such as {key}{equals}{example}"
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

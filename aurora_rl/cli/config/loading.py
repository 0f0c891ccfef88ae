"""Configurations read by OmegaConf from defaults, a YAML file and ``key=value`` pairs, and written back."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf, StringNode
from omegaconf.errors import OmegaConfBaseException

from aurora_rl.cli.config.canary import without_trials
from aurora_rl.cli.config.checks import check_config, without_extras
from aurora_rl.cli.config.privacy import keep_nothing
from aurora_rl.cli.config.schema import Config
from aurora_rl.cli.config.tree import MAX_SHOWN, keys_of, nested, node_at, similar, unfolded, unknown_key, wrong_type
from aurora_rl.cli.errors import ConfigError, naming
from aurora_rl.cli.frozen import plain

PATHS = (
    "model", "traffic.path", "drafter.path", "http.api_keys", "wire.keys", "learner.resume", "learner.recording",
    "compare", "run_dir",
)  # fmt: skip
"""Keys whose value is a path, or a list of paths. Some take other names too, none of which begins with a tilde."""
_MOVED = {
    "canary.most_requests": "canary.max_requests",
    "canary.most_rounds": "canary.max_rounds",
    "control": "baseline",
    "drafter.made_for": "drafter.trained_for",
    "engine.control": "engine.plugin_address",
    "learner.record": "learner.recording",
}
_OF_IMITATION = ("learner.decay", "learner.steps")  # settings of the objective now


def load_config(
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
    usual: Sequence[str] = (),
    saved: str | Path | None = None,
) -> Config:
    """Merge the defaults, then a YAML file, then ``key=value`` pairs.

    Args:
        path: YAML file with any of the keys, as ``engine: {slots: 2}`` or as ``engine.slots: 2``.
        overrides: Pairs such as ``engine.slots=2``.
        usual: Pairs that take the place of defaults.
        saved: YAML file of an earlier run, whose values count where ``path`` and ``overrides`` name none.

    Raises:
        ConfigError: A file cannot be read, a key is unknown (keys of a similar name are named), or a value is of the
            wrong type or out of range.

    Example:
        >>> load_config(overrides=["engine.slots=2"]).engine.slots
        2
    """
    merged = _schema()
    sources = [(pair, _from_pair(pair, merged)) for pair in usual]
    sources += [(str(file), _from_file(file, merged)) for file in (saved, path) if file is not None]
    for pair in overrides:
        if "=" not in pair:
            raise ConfigError(f"expected key=value, got {pair!r}; for example engine.slots=2")
        sources.append((pair, _from_pair(pair, merged)))
    known = keys_of(merged)
    for source, values in sources:
        if moved := [f"{key!r} is {now} now" for key in keys_of(values) if (now := _moved(key)) is not None]:
            raise ConfigError(f"{source}: {', '.join(moved)}")
        equals = "=" if source in overrides or source in usual else ": "
        for key in keys_of(values):
            if key not in known:
                raise ConfigError(unknown_key(key, values, merged, source, equals))
            node = node_at(values, key)
            if node is not None and node._value() == "???":  # OmegaConf would leave the default without a word
                raise ConfigError(f"{key}=??? in {source}: ??? stands for no value; name one, or leave the key out")
        try:
            merged.merge_with(values)
        except (OmegaConfBaseException, TypeError) as error:  # TypeError: a list in the place of a mapping
            if told := wrong_type(values, merged, equals):
                raise ConfigError(told if source in overrides else f"{source}: {told}") from error
            raise ConfigError(f"{source}: {str(error).splitlines()[0]}") from error
        if told := nested(values, merged):
            raise ConfigError(told if source in overrides else f"{source}: {told}")
    try:
        named = {key for _, values in sources[len(usual) :] for key in keys_of(values)}  # by the user
        for settle in (keep_nothing, without_trials, without_extras):
            settle(merged, named)
        expand_home(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:  # an interpolation that leads nowhere
        raise ConfigError(str(error).replace("\n", " ")) from error
    assert isinstance(config, Config)
    check_config(config)
    return config


def expand_home(merged: DictConfig) -> None:
    """Replace a leading ``~`` of every path: a shell leaves it as it is after ``key=``, and in a YAML file."""
    for key in PATHS:
        value = OmegaConf.select(merged, key)
        if isinstance(value, str):
            OmegaConf.update(merged, key, os.path.expanduser(value))
        elif value is not None:
            OmegaConf.update(merged, key, [os.path.expanduser(each) for each in value])


def _moved(key: str) -> str | None:
    """Return what a key is now if it, or a key above it, was renamed."""
    if key in _OF_IMITATION:
        return f"set by objectives=[{{name: imitation, {key.partition('.')[2]}: ...}}]"
    names = (now + key[len(was) :] for was, now in _MOVED.items() if key == was or key.startswith(f"{was}."))
    return next((f"called {name!r}" for name in names), None)


def nearest_key(name: str) -> str | None:
    """Return the configuration key that a user most likely meant by ``name``, None if no key is near.

    Example:
        >>> nearest_key("slots"), nearest_key("drafter"), nearest_key("engine.slot"), nearest_key("1")
        ('engine.slots', 'drafter.name', 'engine.slots', None)
    """
    return next(iter(similar(name, keys_of(_schema()))), None)


def _from_file(path: str | Path, config: DictConfig) -> DictConfig:
    """Read a YAML file. Keys may be nested, or spelled as on the command line; a section may be empty."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        # OmegaConf takes a text for one key, such as the whole of a file that is no YAML.
        maps = isinstance(yaml.compose(text), yaml.MappingNode | None)
        loaded = OmegaConf.load(io.StringIO(text)) if maps else None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from error
    except Exception as error:  # the YAML parser has its own hierarchy of errors
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(
            f"{path} holds no mapping of keys, but {text.strip()[:MAX_SHOWN]!r}; write lines such as "
            "model: smollm2, or name another file"
        )
    with naming(str(path)):
        return unfolded(loaded, config)


def _from_pair(pair: str, config: DictConfig) -> DictConfig:
    """Read ``key=value``: a string key takes the text, with ``${key}`` replaced, any other key takes YAML."""
    key, _, text = pair.partition("=")
    node = node_at(config, key)
    if isinstance(node, StringNode) and not (text == "null" and node._is_optional()):
        known = keys_of(config)
        # What is left of ${ has other meanings to OmegaConf, and written to a run's configuration would get them there.
        rest = re.sub(r"(?<!\\)\$\{([\w.]+)\}", lambda found: "" if found[1] in known else found[0], text)
        if "${" in rest:
            raise ConfigError(
                f"{pair}: ${{ begins the name of a key, such as ${{model}}, got {rest[rest.index('${') :]!r}"
            )
        values = OmegaConf.create({})
        OmegaConf.update(values, key, text)
        return values
    try:
        return OmegaConf.from_dotlist([pair])
    except Exception as error:  # the YAML parser has its own hierarchy of errors
        reason = str(error).splitlines()[0]
        fix = 'give YAML, in which a text that begins with *, &, !, % or @ is quoted, as in ["*"]'
        raise ConfigError(f"{pair}: not a valid value: {reason}; {fix}") from error


def _schema() -> DictConfig:
    """Return the defaults as a tree that takes values: OmegaConf makes that of a frozen dataclass read-only."""
    tree = OmegaConf.structured(Config)
    for part in (tree, *tree.values()):
        if isinstance(part, DictConfig):
            OmegaConf.set_readonly(part, None)
    return tree


def to_yaml(config: Config, *, run_dir: bool = True) -> str:
    """Return the configuration as YAML that :func:`load_config` reads back.

    Without its ``run_dir``, a run's saved configuration starts another run elsewhere.
    """
    tree = plain(config)
    if not run_dir:
        del tree["run_dir"]
    return OmegaConf.to_yaml(OmegaConf.create(tree))

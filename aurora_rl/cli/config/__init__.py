"""The configuration of the commands: its keys, how it is read, and what its values must do."""

from aurora_rl.cli.config.schema import Config, load_config, nearest_key, to_yaml

__all__ = ["Config", "load_config", "nearest_key", "to_yaml"]

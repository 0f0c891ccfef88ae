"""The configuration of the commands: its keys, how it is read, and what its values must do."""

from aurora_rl.cli.config.loading import load_config, nearest_key, to_yaml
from aurora_rl.cli.config.schema import (
    BaselineConfig,
    CanaryConfig,
    CheckpointConfig,
    Config,
    DrafterConfig,
    EngineConfig,
    FleetConfig,
    GateConfig,
    HttpConfig,
    LearnerConfig,
    PrivacyConfig,
    TelemetryConfig,
    TrafficConfig,
    WireConfig,
)  # fmt: skip

__all__ = [
    "BaselineConfig", "CanaryConfig", "CheckpointConfig", "Config", "DrafterConfig", "EngineConfig", "FleetConfig",
    "GateConfig", "HttpConfig", "LearnerConfig", "PrivacyConfig", "TelemetryConfig", "TrafficConfig", "WireConfig",
    "load_config", "nearest_key", "to_yaml",
]  # fmt: skip

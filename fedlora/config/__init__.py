"""The whole configuration of a run: frozen dataclasses that check themselves; TOML is their spelling.

A field ``local_steps`` of `TrainConfig` is the key ``train.local-steps``. Flower's run-config takes
only booleans, integers, floats and strings, so lists are comma strings and structures JSON strings.
``[tool.flwr.app.config]`` in ``pyproject.toml`` holds the same keys with the same defaults.
"""

from fedlora.config.checks import Scalar, float_list, int_list, name_list
from fedlora.config.devices import DeviceProfile, DevicesConfig
from fedlora.config.files import (
    AnyPath,
    Config,
    FlatConfig,
    as_config,
    flatten,
    from_flat,
    from_keywords,
    parse_overrides,
    read_config,
    to_flat,
    unflatten,
)
from fedlora.config.privacy import PrivacyConfig
from fedlora.config.run import ClientGroup, RunConfig
from fedlora.config.sections import (
    DataConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    StudyConfig,
    TrackingConfig,
)
from fedlora.config.secure import SecureConfig
from fedlora.config.strategy import StrategyConfig
from fedlora.config.train import TrainConfig

__all__ = [
    "AnyPath",
    "ClientGroup",
    "Config",
    "DataConfig",
    "DeviceProfile",
    "DevicesConfig",
    "EngineConfig",
    "FlatConfig",
    "LoraConfig",
    "ModelConfig",
    "PrivacyConfig",
    "RunConfig",
    "Scalar",
    "SecureConfig",
    "StrategyConfig",
    "StudyConfig",
    "TrackingConfig",
    "TrainConfig",
    "as_config",
    "flatten",
    "float_list",
    "from_flat",
    "from_keywords",
    "int_list",
    "name_list",
    "parse_overrides",
    "read_config",
    "to_flat",
    "unflatten",
]

"""A run's configuration as dotted keys, the form that TOML files and Flower's run-config share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from fedlora.config.checks import Scalar, from_keys, kebab
from fedlora.config.run import RunConfig
from fedlora.errors import ConfigError

FlatConfig = dict[str, Scalar]


def flatten(nested: Mapping[str, Any], prefix: str = "") -> FlatConfig:
    """Nested TOML tables to dotted keys.

    Raises:
        ConfigError: a value that Flower's run-config cannot carry (a list, a date).

    >>> flatten({"lora": {"rank": 4}, "seed": 1})
    {'lora.rank': 4, 'seed': 1}
    """
    flat: FlatConfig = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        elif isinstance(value, (bool, int, float, str)):
            flat[prefix + key] = value
        else:
            raise ConfigError(
                f"{prefix}{key} = {value}: must be a boolean, number or string "
                "(write a list as a comma string)"
            )
    return flat


def from_flat(flat: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from dotted keys; what is absent takes its default.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value.

    >>> from_flat({"lora.rank": 4}).lora.rank
    4
    """
    known = to_flat(RunConfig())
    for key in flat:
        if key not in known:
            near = get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"keys look like {', '.join(list(known)[:3])}"
            raise ConfigError(f"{key} = {flat[key]!r}: unknown key ({hint})")
    sections: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for key, value in flat.items():
        section, dot, name = key.rpartition(".")
        (sections.setdefault(section, {}) if dot else top)[name] = value
    built = {
        name: from_keys(type(getattr(RunConfig(), name)), values, f"{name}.")
        for name, values in sections.items()
    }
    config: RunConfig = from_keys(RunConfig, top, "", built)
    return config


def to_flat(config: Any, prefix: str = "") -> FlatConfig:
    """All keys with their values, in field order; `from_flat` reads it back."""
    flat: FlatConfig = {}
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            flat.update(to_flat(value, f"{prefix}{kebab(name)}."))
        else:
            flat[prefix + kebab(name)] = value
    return flat

"""What callers pass, checked: whatever is of another kind is refused in one line, not met later on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from fedlora.config import Config, RunConfig, as_config, from_keywords
from fedlora.config.files import plain
from fedlora.core.files import user_path
from fedlora.errors import ConfigError, first_line


def path_of(what: str, value: Any) -> Path:
    """A path that is a string or a ``Path``.

    Raises:
        ConfigError: anything else, such as a result in place of its directory.
    """
    return user_path(_text_of(what, value, "a path, as a string or a Path"))


def paths_of(what: str, value: Any) -> list[Path]:
    """Paths of a list.

    Raises:
        ConfigError: one path, or something that is none.
    """
    return [path_of(what, each) for each in _listed(what, value, "paths")]


def numbers_of(what: str, value: Any) -> list[float]:
    """Numbers of a list.

    Raises:
        ConfigError: one number, a string, or something that is no number.
    """
    return [number_of(what, each) for each in _listed(what, value, "numbers")]


def number_of(what: str, value: Any, kind: type[int] | type[float] = float) -> Any:
    """A number; whole where its kind is int.

    Raises:
        ConfigError: anything else, a truth value among it.
    """
    try:
        if isinstance(value, (bool, str)) or (kind(value) != value and value == value):
            raise TypeError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        words = "a whole number" if kind is int else "a number"
        raise refused(what, value, words) from None


def name_of(what: str, value: Any) -> str:
    """A name, of data or a strategy, or a path.

    Raises:
        ConfigError: anything else; of a table it is said how it gets a name.
    """
    return _text_of(what, value, "a name or a path, as a string or a Path")


def settings_of(
    function: str, config: Config | None, overrides: Mapping[str, Any] | None, keys: Mapping[str, Any]
) -> RunConfig:
    """The configuration of a call: a file, an object or keys, with overrides and then keywords on top.

    Raises:
        ConfigError: a configuration that cannot be carried out, or none.
    """
    if isinstance(config, PathLike):
        config = Path(config)
    elif isinstance(config, Mapping):
        config = _plain(config)
    elif config is not None and not isinstance(config, (RunConfig, str)):
        raise refused(f"{function}: config", config, "a TOML file, a mapping of keys or a RunConfig")
    if overrides is not None and not isinstance(overrides, Mapping):
        raise refused(f"{function}: overrides", overrides, "a mapping of keys, such as {'lora.rank': 4}")
    return as_config(config or {}, {**_plain(overrides or {}), **from_keywords(_plain(keys))})


def _plain(keys: Mapping[str, Any], table: str = "") -> dict[str, Any]:
    """Keys whose values are those that TOML has: paths become strings, and tuples lists."""
    for key in keys:
        if not isinstance(key, str):
            raise refused(f"a key{table and ' of '}{table.rstrip('.')}", key, "a string")
    return {key: _value(f"{table}{key}", value) for key, value in keys.items()}


def _value(name: str, given: Any) -> Any:
    value = plain(given)
    if isinstance(value, Mapping):
        return _plain(value, f"{name}.")
    if isinstance(value, list):
        return [_value(name, each) for each in value]
    if value is not None and not isinstance(value, (bool, int, float, str)):
        raise refused(name, given, "a boolean, number or string")
    return value


def _text_of(what: str, value: Any, takes: str) -> str:
    found = fspath(value) if isinstance(value, PathLike) else value
    if not isinstance(found, str):
        raise refused(what, value, takes)
    return found


def _listed(what: str, value: Any, kind: str) -> list[Any]:
    if isinstance(value, (str, bytes, PathLike, Mapping)) or not isinstance(value, Iterable):
        raise refused(what, value, f"a list of {kind}")
    return list(value)


def refused(what: str, value: Any, takes: str) -> ConfigError:
    """The line that names an argument, its value in short, what is taken, and how one comes by it."""
    shown, hint = f"{first_line(repr(value))[:40]} ({type(value).__name__})", ""
    if hasattr(value, "columns"):
        shown, hint = f"a {type(value).__name__}", ": fedlora.data.from_dataframe(frame) is that"
    elif hasattr(value, "column_names"):
        shown, hint = f"a {type(value).__name__}", ": fedlora.data.from_datasets(dataset) is that"
    elif hasattr(value, "adapter") and hasattr(value, "path"):
        shown, hint = f"a {type(value).__name__}", ": .adapter and .path of it are such"
    return ConfigError(f"{what} = {shown}: must be {takes}{hint}")

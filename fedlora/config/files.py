"""Configurations as files and command line: TOML in, ``--set`` on top, TOML out."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from fedlora.config.flat import FlatConfig, flatten, from_flat, to_flat
from fedlora.config.run import RunConfig
from fedlora.errors import ConfigError
from fedlora.files import user_path

PLACES = ("model.name", "data.name", "data.test", "data.public", "output-dir")
"""Keys that may name a place on this machine; one that begins with ``~`` does."""


def read_config(path: Path, overrides: FlatConfig | None = None) -> RunConfig:
    """The configuration in a TOML file, with ``--set`` overrides on top.

    ``privacy.ledger`` becomes an absolute path, so that it is one place for every process and command;
    ``model.chat-template`` the text of the file that it names, so that it is the same on every node.

    Raises:
        ConfigError: no such file, not TOML, or a key or value that is not accepted.
    """
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from None
    flat = {**flatten(table), **(overrides or {})}
    ledger = flat.get("privacy.ledger")
    if isinstance(ledger, str) and ledger:
        flat["privacy.ledger"] = str(user_path(ledger).absolute())
    for key in PLACES:
        value = flat.get(key)
        if isinstance(value, str) and value.startswith("~"):
            flat[key] = str(user_path(value))
    template = flat.get("model.chat-template")
    if isinstance(template, str) and template and "{" not in template:
        flat["model.chat-template"] = _text_of("model.chat-template", template)
    return from_flat(flat)


def _text_of(key: str, name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{key} = {name!r}: neither a template nor a file of one ({error})") from None


def parse_overrides(assignments: list[str]) -> FlatConfig:
    """``key=value`` strings as a flat configuration; a value is TOML, or else a plain string.

    Under a key that takes strings a bare number is a string: ``lora.ranks=4``.

    Raises:
        ConfigError: an assignment without ``=``.

    >>> parse_overrides(["lora.rank=4", "strategy.name=flora"])
    {'lora.rank': 4, 'strategy.name': 'flora'}
    """
    flat: FlatConfig = {}
    defaults = to_flat(RunConfig())
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: must be key=value, for instance lora.rank=4")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        if isinstance(defaults.get(key.strip()), str) and not isinstance(value, str):
            value = text
        flat.update(flatten({key.strip(): value}))
    return flat


def unflatten(flat: FlatConfig) -> dict[str, Any]:
    """Dotted keys to nested tables."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *sections, name = key.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[name] = value
    return nested

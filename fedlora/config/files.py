"""Configurations as files and command line: TOML in, ``--set`` on top, TOML out."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from functools import cache
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

from fedlora.config.checks import Scalar, refusal
from fedlora.config.run import RunConfig
from fedlora.config.section import by_field, kebab
from fedlora.core.files import user_path
from fedlora.errors import ConfigError

FlatConfig = dict[str, Scalar]
AnyPath: TypeAlias = str | Path
Config: TypeAlias = RunConfig | AnyPath | Mapping[str, Any]
"""A configuration: an object, a TOML file, or a mapping of keys as in one: ``{"lora.rank": 4}`` and
``{"lora": {"rank": 4}}`` are the same."""


def flatten(nested: Mapping[str, Any], prefix: str = "") -> FlatConfig:
    """Nested TOML tables to dotted keys.

    A list becomes the comma string, a table or a list of tables the JSON, in which a key of text keeps it.

    Raises:
        ConfigError: a value that no key takes (a date), or a list whose entries hold commas.

    >>> flatten({"lora": {"rank": 4, "ranks": [2, 4]}, "strategy": {"options": {"lam": 0.5}}})
    {'lora.rank': 4, 'lora.ranks': '2,4', 'strategy.options': '{"lam": 0.5}'}
    """
    flat: FlatConfig = {}
    for key, given in nested.items():
        name, value = prefix + key, plain(given)
        if isinstance(value, (bool, int, float, str)):
            flat[name] = value
        elif isinstance(value, (Mapping, list)) and name in _keys_of_text():
            flat[name] = _as_text(name, value)
        elif isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            raise ConfigError(f"{name} = {given}: must be a boolean, number or string")
    return flat


def plain(value: Any) -> Any:
    """A value as TOML would have it: numbers and lists of NumPy, tuples and paths of Python in plain form."""
    if type(value).__module__ == "numpy":
        return value.tolist()
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(each) for key, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


@cache
def _keys_of_text() -> frozenset[str]:
    return frozenset(key for key, value in to_flat(RunConfig()).items() if isinstance(value, str))


def _as_text(key: str, value: Mapping[str, Any] | list[Any]) -> str:
    """A list or table in the form in which a key of text keeps it."""
    if isinstance(value, list) and not any(isinstance(entry, (Mapping, list)) for entry in value):
        for entry in value:
            if isinstance(entry, bool) or not isinstance(entry, (int, float, str)) or "," in str(entry):
                raise ConfigError(f"{key} = {value}: {entry!r} cannot stand in a list, names and numbers can")
        return ",".join(map(str, value))
    if key.startswith("study.") and isinstance(value, Mapping):  # names of runs -> their keys
        value = {n: flatten(own) if isinstance(own, Mapping) else own for n, own in value.items()}
    try:
        return json.dumps(value)
    except TypeError as error:
        raise ConfigError(f"{key} = {value}: {error}, which no key takes") from None


def from_flat(flat: Mapping[str, Any]) -> RunConfig:
    """A checked `RunConfig` from dotted keys; what is absent takes its default.

    Raises:
        ConfigError: an unknown key, a wrong type or an impossible value.

    >>> from_flat({"lora.rank": 4}).lora.rank
    4
    """
    defaults = RunConfig()
    known = to_flat(defaults)
    sections: dict[str, dict[str, Any]] = {}
    for key, value in flat.items():
        if key not in known:
            raise ConfigError(refusal(key, value, f"unknown key ({_hint(key, known)})"))
        if isinstance(value, str) and "\0" in value:
            raise ConfigError(refusal(key, value, "holds a NUL, which no path or name has"))
        table, _, name = key.rpartition(".")
        sections.setdefault(table, {})[name] = value
    top = sections.pop("", {})
    built = {table: type(getattr(defaults, table))(**by_field(keys)) for table, keys in sections.items()}
    return RunConfig(**by_field(top), **built)


def _hint(key: str, known: Collection[str]) -> str:
    """The key that was meant: the likest of the same table, else the same name elsewhere, else the likest.

    >>> _hint("train.epochs", ["train.local-epochs", "lora.rank"]), _hint("rank", ["seed", "lora.rank"])
    ('did you mean train.local-epochs?', 'did you mean lora.rank?')
    >>> _hint("lora.r", ["lora.rank", "lora.alpha"]), _hint("x.y", ["seed"])
    ('[lora] has rank, alpha', 'keys look like seed')
    """
    table, _, name = key.rpartition(".")
    beside = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == table}
    same = [other for other in known if other.rpartition(".")[2] == name]
    near = get_close_matches(name, beside, n=1, cutoff=0.8 if same else 0.6)
    within = [other for other in beside if len(name) > 3 and name in other]
    if near or (within and not same):
        return f"did you mean {beside[(near or within)[0]]}?"
    same += get_close_matches(key, known, n=1) if not table or not beside else []
    if same:
        return f"did you mean {same[0]}?"
    if table and beside:
        return f"[{table}] has {', '.join(beside)}"
    return f"keys look like {', '.join(list(known)[:3])}"


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


PLACES = (
    "model.name",
    "model.adapter",
    "data.name",
    "data.test",
    "data.public",
    "devices.trace",
    "output-dir",
)
"""Keys that may name a place on this machine; one that begins with ``~`` does."""


def read_config(path: Path, overrides: FlatConfig | None = None) -> RunConfig:
    """The configuration in a TOML file, with ``--set`` overrides on top.

    ``privacy.ledger`` becomes an absolute path, so that it is one place for every process and command;
    ``model.chat-template`` the text of the file that it names, so that it is the same on every node.

    Raises:
        ConfigError: no such file, not TOML, or a key or value that is not accepted.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a directory, name a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not a TOML file ({error})") from None
    return _at_home({**flatten(table), **(overrides or {})})


def as_config(config: Config, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """A checked configuration, with overrides on top.

    Raises:
        ConfigError: as `read_config` and `from_flat`.
    """
    over = flatten(overrides or {})
    if isinstance(config, (str, Path)):
        return read_config(Path(config).expanduser(), over)
    flat = to_flat(config) if isinstance(config, RunConfig) else flatten(config)
    return _at_home({**flat, **over})


def from_keywords(keys: Mapping[str, Any]) -> FlatConfig:
    """Dotted keys from Python's keyword arguments: fields, and sections as mappings of fields.

    For a section that has a name, a string is that name.

    Raises:
        ConfigError: as `flatten`.

    >>> from_keywords({"strategy": "flora", "num_server_rounds": 3, "lora": {"target_modules": ["q"]}})
    {'strategy.name': 'flora', 'num-server-rounds': 3, 'lora.target-modules': 'q'}
    """
    flat: FlatConfig = {}
    for field, given in keys.items():
        value = plain(given)
        if isinstance(value, str) and f"{field}.name" in _keys_of_text():
            flat[f"{field}.name"] = value
        elif isinstance(value, Mapping) and kebab(field) not in _keys_of_text():
            flat |= flatten({kebab(field): {kebab(str(name)): each for name, each in value.items()}})
        else:
            flat |= flatten({kebab(field): value})
    return flat


def _at_home(flat: FlatConfig) -> RunConfig:
    """The configuration with what its keys name on this machine found, see `read_config`."""
    flat = dict(flat)
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

    Under a key that takes strings a bare number is a string: ``lora.ranks=4``; a list or table of TOML
    becomes what `flatten` makes of it.

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
        if isinstance(defaults.get(key.strip()), str) and not isinstance(value, (str, list, dict)):
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

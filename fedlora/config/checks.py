"""How a configured value is checked and decoded; every refusal is one line with key and value."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

from fedlora.errors import ConfigError

Scalar = bool | int | float | str


def require(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raise the one-line `ConfigError` for a key unless the condition holds."""
    if not condition:
        shown = repr(value) if isinstance(value, str) else value
        raise ConfigError(f"{key} = {shown}: {accepted}")


def one_of(key: str, value: str, accepted: tuple[str, ...]) -> None:
    """Refuse a value outside a fixed list."""
    require(value in accepted, key, value, f"accepted are {', '.join(accepted)}")


def int_list(key: str, text: str) -> tuple[int, ...]:
    """A comma string of whole numbers and ranges.

    >>> int_list("lora.ranks", "4, 8,16-18")
    (4, 8, 16, 17, 18)
    """
    numbers: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        first, dash, last = part.partition("-")
        try:
            span = range(int(first), int(last) + 1) if dash else [int(part)]
        except ValueError:
            span = range(0)
        if not span:
            raise ConfigError(f"{key} = {text!r}: {part!r} is not a whole number or a range such as 0-3")
        numbers.extend(span)
    return tuple(numbers)


def float_list(key: str, text: str) -> tuple[float, ...]:
    """A comma string of positive numbers.

    >>> float_list("study.tune-learning-rates", "0.003, 1e-2")
    (0.003, 0.01)
    """
    numbers: list[float] = []
    for part in name_list(text):
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        require(0 < number < math.inf, key, text, f"{part!r} is no number > 0")
        numbers.append(number)
    return tuple(numbers)


def name_list(text: str) -> tuple[str, ...]:
    """A comma string of names, blanks stripped, empty parts dropped."""
    return tuple(filter(None, (p.strip() for p in text.split(","))))


def kebab(name: str) -> str:
    """Field name to key."""
    return name.replace("_", "-")


def snake(key: str) -> str:
    """Key to field name."""
    return key.replace("-", "_")


def parse_json(key: str, text: str, kind: type) -> Any:
    """A JSON string of the given kind; the empty string is the empty value.

    Raises:
        ConfigError: not JSON, or another kind.
    """
    if not text.strip():
        return kind()
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{key} = {text!r}: not JSON ({error})") from None
    wanted = {"dict": "object", "list": "list"}[kind.__name__]
    require(isinstance(value, kind), key, text, f"must be a JSON {wanted}")
    return value


def from_keys(
    kind: type[Any], values: Mapping[str, Any], prefix: str, built: Mapping[str, Any] | None = None
) -> Any:
    """One dataclass from kebab keys, types checked field by field."""
    fields = {f.name: f for f in dataclasses.fields(kind)}
    arguments: dict[str, Any] = dict(built or {})
    for key, value in values.items():
        name = snake(key)
        if name not in fields:
            raise ConfigError(
                f"{prefix}{key} = {value!r}: unknown key, accepted are {', '.join(map(kebab, fields))}"
            )
        arguments[name] = _typed(prefix + key, value, str(fields[name].type))
    missing = [
        name for name, f in fields.items()
        if name not in arguments and f.default is f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ConfigError(f"{prefix}{kebab(missing[0])} is missing")
    return kind(**arguments)


def _typed(key: str, value: Any, annotation: str) -> Any:
    wanted = annotation.removesuffix(" | None")
    if wanted == "float" and type(value) is int:
        return float(value)
    if type(value).__name__ != wanted:
        names = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false"}
        raise ConfigError(f"{key} = {value!r}: must be {names[wanted]}")
    if wanted == "float" and not math.isfinite(value):
        raise ConfigError(f"{key} = {value}: must be finite")
    return value

"""Lists and JSON in strings, and the one line with which a value is refused."""

from __future__ import annotations

import json
import math
from typing import Any

from fedlora.errors import ConfigError, unknown_name

Scalar = bool | int | float | str


def require(condition: bool, key: str, value: object, accepted: str) -> None:
    """Raise the one-line `ConfigError` for a key unless the condition holds."""
    if not condition:
        raise ConfigError(refusal(key, value, accepted))


def refusal(key: str, value: object, accepted: str) -> str:
    """The line that names key, value and what is accepted."""
    return f"{key} = {value!r}: {accepted}"


def one_of(key: str, value: str, accepted: tuple[str, ...]) -> None:
    """Refuse a value outside a fixed list."""
    if value not in accepted:
        raise unknown_name(key, value, accepted)


def int_list(key: str, text: str) -> tuple[int, ...]:
    """A comma string of whole numbers and ranges.

    >>> int_list("lora.ranks", "4, 8,16-18")
    (4, 8, 16, 17, 18)
    """
    numbers: list[int] = []
    for part in name_list(text):
        first, dash, last = part.partition("-")
        try:
            span = range(int(first), int(last) + 1) if dash else [int(part)]
        except ValueError:
            span = range(0)
        require(bool(span), key, text, f"{part!r} is not a whole number or a range such as 0-3")
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
        raise ConfigError(refusal(key, text, f"not JSON ({error})")) from None
    require(isinstance(value, kind), key, text, f"must be a JSON {'object' if kind is dict else 'list'}")
    return value

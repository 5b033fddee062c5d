"""Sections: frozen pydantic dataclasses, whose annotations say what a value may be.

A field ``local_steps`` is the key ``local-steps``. ``Annotated[float, Field(gt=0), "why"]`` adds a reason to
the refusal; what concerns several fields is checked in ``__post_init__``, by `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import field
from difflib import get_close_matches
from functools import wraps
from typing import Any, TypeVar, dataclass_transform, get_args

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass

from fedlora.config.checks import refusal
from fedlora.errors import ConfigError, unknown_name

T = TypeVar("T")
SHORTER = {
    "Input should": "must", "greater than or equal to": ">=", "greater than": ">",
    "less than or equal to": "<=", "less than": "<",
}  # fmt: skip
STRICT = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def section(prefix: str = "") -> Callable[[type[T]], type[T]]:
    """Make a class a frozen, keyword-only dataclass that refuses a value by a `ConfigError` of one line.

    Args:
        prefix: what its keys begin with, for instance ``lora.``.
    """

    def checked(cls: type[T]) -> type[T]:
        made: Any = dataclass(frozen=True, kw_only=True, config=STRICT)(cls)
        build = made.__init__

        @wraps(build)
        def init(self: Any, **values: Any) -> None:
            try:
                build(self, **values)
            except ValidationError as error:
                raise _in_one_line(prefix, made, error) from None

        made.__init__ = init
        return made  # type: ignore[no-any-return]

    return checked


def kebab(name: str) -> str:
    """Field name to key."""
    return name.replace("_", "-")


def snake(key: str) -> str:
    """Key to field name."""
    return key.replace("-", "_")


def by_field(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a section by field name, from values by key without the prefix."""
    return {snake(key): value for key, value in values.items()}


def _in_one_line(prefix: str, kind: Any, error: ValidationError) -> ConfigError:
    """The first complaint, in pydantic's words but for what a user calls things."""
    first = error.errors(include_url=False)[0]
    mine = first.get("ctx", {}).get("error")
    if isinstance(mine, ConfigError):
        return mine
    key, fields = prefix + kebab(str(first["loc"][0])), kind.__pydantic_fields__
    if first["type"] == "missing":
        return ConfigError(f"{key} is missing")
    if first["type"] == "unexpected_keyword_argument":
        known = [*map(kebab, fields)]
        near = get_close_matches(key.removeprefix(prefix), known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        accepted = f"unknown key{hint}, accepted are {', '.join(known)}"
    elif first["type"] == "literal_error":
        return unknown_name(key, first["input"], get_args(fields[first["loc"][0]].annotation))
    else:
        accepted = first["msg"]
        for words, short in SHORTER.items():
            accepted = accepted.replace(words, short)
        for reason in fields[first["loc"][0]].metadata:
            accepted += f" ({reason})" if isinstance(reason, str) else ""
    return ConfigError(refusal(key, first["input"], accepted))

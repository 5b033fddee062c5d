"""A chart of the report, and the numbers behind it."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup


@dataclass(frozen=True, slots=True)
class Numbers:
    """A table: usually a line for each round and a column for each run."""

    header: tuple[str, ...]
    body: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One chart for the page: text around it, the drawing, and its numbers unless a table has them."""

    name: str
    title: str
    note: str
    svg: Markup
    numbers: Numbers | None = None

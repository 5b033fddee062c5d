"""Rewrites the README's tables, of strategies and of decided claims: ``python -m experiments.readme``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from experiments.marked import marks, remade
from experiments.tables import decided_table, texts
from fedlora.core.files import write_atomic
from strategies.registry import markdown_table

README = Path(__file__).parent.parent / "README.md"


def decided() -> str:
    """Of all studies whose text shows its claims."""
    return decided_table(page.parent.name for page in texts())


TABLES: dict[str, Callable[[], str]] = {"strategies": markdown_table, "decided": decided}
"""What stands between the marks of these names."""


def with_tables(text: str) -> str:
    """The page with the tables of today between their marks."""
    if sorted(marks(text)) != sorted(TABLES):
        raise SystemExit(f"the page must have one table between marks for each of {', '.join(TABLES)}")
    return remade(text, TABLES)


def main(page: Path = README) -> None:
    """Write it."""
    write_atomic(page, with_tables(page.read_text()))


if __name__ == "__main__":
    main()

"""Rewrites what follows from the registry of rules: ``python -m experiments.readme``.

The tables of strategies and of decided claims in ``docs/strategies.md``, that of deviations in
``docs/strategy.md``, and the public classes as type checkers read them, ``strategies/__init__.pyi``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.marked import marks, remade
from experiments.tables import decided_table, texts
from fedlora.core.files import write_atomic
from strategies.named import stub
from strategies.registry import deviations_table, markdown_table

ROOT = Path(__file__).parent.parent


def decided() -> str:
    """Of all studies whose text shows its claims."""
    return decided_table(page.parent.name for page in texts())


TABLES: dict[str, Callable[[], str]] = {
    "strategies": markdown_table, "decided": decided, "deviations": deviations_table
}  # fmt: skip
"""What stands between the marks of these names."""
PAGES = {"docs/strategies.md": ["decided", "strategies"], "docs/strategy.md": ["deviations"]}
"""Page -> the tables that it must have."""
STUB = ROOT / "strategies" / "__init__.pyi"


def with_tables(text: str, names: Sequence[str]) -> str:
    """The page with the tables of today between their marks."""
    if sorted(marks(text)) != sorted(names):
        raise SystemExit(f"the page must have one table between marks for each of {', '.join(names)}")
    return remade(text, TABLES)


def main(root: Path = ROOT) -> None:
    """Write all pages below ``root``."""
    for page, names in PAGES.items():
        write_atomic(root / page, with_tables((root / page).read_text(), names))
    write_atomic(root / STUB.relative_to(ROOT), stub())


if __name__ == "__main__":
    main()

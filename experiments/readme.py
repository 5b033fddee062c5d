"""Rewrites the README's table of strategies from the rules' facts: ``python -m experiments.readme``."""

from __future__ import annotations

import re
from pathlib import Path

from fedlora.files import write_atomic
from strategies.table import markdown_table

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- strategies\b[^\n]*-->\n).*?(\n<!-- /strategies -->)", re.S)


def with_table(text: str) -> str:
    """The page with the table of today between its markers."""
    rewritten, count = MARKED.subn(lambda found: f"{found[1]}{markdown_table()}{found[2]}", text)
    if count != 1:
        raise SystemExit(f"the page has {count} tables between <!-- strategies --> markers, it must have one")
    return rewritten


def main(page: Path = README) -> None:
    """Write it."""
    write_atomic(page, with_table(page.read_text()))


if __name__ == "__main__":
    main()

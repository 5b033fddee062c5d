"""Tables between marks: ``<!-- NAME: anything -->``, the table, ``<!-- /NAME -->``."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

MARKED = re.compile(r"(<!-- (\w+)\b[^\n]*-->\n)(?:.*?\n)??(<!-- /\2 -->)", re.S)


def marks(text: str) -> list[str]:
    """The names of what stands between marks, in the order of the text."""
    return [found[2] for found in MARKED.finditer(text)]


def remade(text: str, make: Mapping[str, Callable[[], str]]) -> str:
    """A text with everything that stands between marks made anew, each by the function of its name."""
    return MARKED.sub(lambda found: f"{found[1]}{make[found[2]]()}\n{found[3]}", text)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *lines))

"""Colours, markers and lines by which the runs of a report are told apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.study.analyse.summary import CONTROL, Row

INK, MUTED, RULE, PAPER = "#1d1f21", "#6d6f73", "#dad7ce", "#fbfaf7"
HUES = ("#2f5fe0", "#d0410f", "#46a049", "#d955cc", "#1b3a6b", "#7f1d22")
"""Distinct to the colour-blind (prot-, deuter- and tritanopia simulated), contrast with the paper >= 3."""
VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    PAPER: "var(--paper)",
    **{hue: f"var(--hue-{index})" for index, hue in enumerate(HUES)},
}
"""Drawn colour -> the style sheet's variable, which has a light and a dark value."""
MARKS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">", "h", "*")
LineStyle = str | tuple[int, tuple[float, ...]]
SHORT_DASHES: LineStyle = (0, (2.5, 1.5))
DOTS: LineStyle = (0, (1, 3))
LONG_DASHES: tuple[LineStyle, ...] = ((0, (7, 3)), (0, (7, 2.5, 1.5, 2.5)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """One run's look; ``key`` ties its parts to its button."""

    key: str
    colour: str = MUTED
    marker: str = "o"
    line: LineStyle = "-"
    hollow: bool = False

    @property
    def marking(self) -> dict[str, Any]:
        """Arguments of ``Axes.plot`` for the markers."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markerfacecolor": PAPER if self.hollow else self.colour,
            "markeredgewidth": 1.3,
        }


def styles_of(rows: Sequence[Row]) -> dict[str, Style]:
    """The style of each row by its name; the control and the references are grey."""
    places = {r.name: _place(r, rows) for r in rows if r.kind != "reference" and r.strategy != CONTROL}
    hues = {place: HUES[i % len(HUES)] for i, place in enumerate(dict.fromkeys(places.values()))}
    references = [r.name for r in rows if r.kind == "reference"]
    settings = list(dict.fromkeys(r.setting for r in rows))
    styles: dict[str, Style] = {}
    for index, row in enumerate(rows):
        marked = settings.index(row.setting) if row.setting else index
        key, marker = f"s{index}", MARKS[marked % len(MARKS)]
        if row.kind == "reference":
            dashes = LONG_DASHES[references.index(row.name) % len(LONG_DASHES)]
            styles[row.name] = Style(key=key, marker=marker, line=dashes, hollow=True)
        else:
            line = SHORT_DASHES if row.private else "-"
            colour = hues[places[row.name]] if row.name in places else MUTED
            styles[row.name] = Style(key=key, colour=colour, marker=marker, line=line, hollow=row.private)
    return styles


def _place(row: Row, rows: Sequence[Row]) -> tuple[str, int]:
    """Strategy and number among its rows of the same privacy: a private run shares its plain one's colour."""
    if row.setting:
        return row.method, 0
    alike = [r.name for r in rows if r.strategy == row.strategy and r.private == row.private]
    return row.strategy, alike.index(row.name)

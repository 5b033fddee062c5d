"""How each run looks in every chart: a marker of its own, a strategy's colour, hollow if private.

Under settings the colour tells the method and the marker the setting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from fedlora.study.summary import CONTROL, Row
from fedlora.study.svg import HUES, MUTED, PAPER, SETTINGS, inline_svg

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


def swatch(style: Style) -> Markup:
    """A short piece of the line with its marker, for a button; a decoration."""
    with rc_context(SETTINGS):
        figure = Figure(figsize=(30 / 72, 14 / 72))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.plot([0, 1], [0.5, 0.5], color=style.colour, linestyle=style.line)
        axes.plot([0.5], [0.5], **style.marking)
        return inline_svg(figure, f"swatch-{style.key}", "")

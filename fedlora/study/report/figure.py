"""Figures of the report as inline SVG: series with markers that say their value, named levels, axes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fedlora.study.analyse.curves import Curve
from fedlora.study.analyse.intervals import Estimate
from fedlora.study.report.styles import INK, MUTED, RULE, VARIABLES, Style
from fedlora.tasks.metrics import Metric

SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fedlora",
    "text.parse_math": False,
    "font.size": 12,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.5,
}
"""Matplotlib settings under which figures are made and written."""
SERIES = "series:"
_NOISE = r'<metadata>.*?</metadata>|<style.*?</style>| xmlns(:\w+)?="[^"]*"|font-family: [^;"]*;? ?|xlink:'
"""Metadata, style sheets, namespaces and fonts, of which a page has its own."""


def series_gid(key: str, part: str) -> str:
    """The gid of an artist that belongs to the series ``key``; parts are told apart by name."""
    return f"{SERIES}{key}:{part}"


def inline_svg(
    figure: Figure, name: str, label: str, notes: Mapping[str, Sequence[str]] | None = None
) -> Markup:
    """The figure as an ``<svg>`` element for HTML.

    Artists with a `series_gid` become ``<g class="series" data-series=KEY>``. Colours become variables of the
    style sheet; the ids that are used are hashes with ``name``, so that several charts share a page.

    Args:
        figure: what was drawn, under `SETTINGS`.
        name: unique on the page.
        label: what assistive technology reads out; empty marks a decoration.
        notes: gid -> what each marker says when pointed at, in drawing order.
    """
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = re.sub(_NOISE, "", buffer.getvalue(), flags=re.S)
    text = re.sub(r"\s*\n\s*", " ", text[text.index("<svg") :]).replace("> <", "><")
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, variable)
    root = ElementTree.fromstring(text)
    for group in root.iter("g"):
        gid = group.attrib.pop("id", "")
        if gid.startswith(SERIES):
            group.attrib |= {"class": "series", "data-series": gid.split(":")[1]}
        if notes and gid in notes:
            for marker, note in zip(group.iter("use"), notes[gid], strict=True):
                ElementTree.SubElement(marker, "title").text = note
    spoken = {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    root.attrib = {"viewBox": root.attrib["viewBox"], **spoken}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


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


class Numbers(NamedTuple):
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
    figure: Drawing
    numbers: Numbers | None = None


WIDTH, HEIGHT = 460, 300
"""Of a chart, in SVG units; a phone shows it at about 0.75, so that 12 units of text stay legible."""
MARKERS = 40
"""A series of more points has markers on some of them only."""
LONGEST_NAME = 16
"""Letters of a level's name beside a chart; the legend and the table have all of them."""
FEW_DECADES = 50.0
"""A logarithmic axis that spans less than this factor has too few powers of ten to read it by."""
Which = Literal["x", "y"]


@dataclass(frozen=True, slots=True)
class Level:
    """A horizontal line with its name and value; its style's key ties it to a series, or to nothing."""

    name: str
    value: float
    shown: str
    style: Style


class Drawing(Figure):
    """A matplotlib figure that notebooks show."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=144)
        return buffer.getvalue()


class Canvas:
    """A figure of the report, to be used under `SETTINGS`."""

    def __init__(self, height: float = HEIGHT) -> None:
        self.figure = Drawing(figsize=(WIDTH / 72, height / 72), layout="constrained")
        self.axes: Axes = self.figure.add_subplot()
        self._notes: dict[str, list[str]] = {}

    def curve(self, curve: Curve, style: Style, say: Callable[[float, float], str]) -> None:
        """A line with its markers, and the range over the seeds if there are several."""
        if len(curve.row.seeds) > 1:
            gid = series_gid(style.key, "band")
            shade: dict[str, Any] = {"color": style.colour, "alpha": 0.14, "linewidth": 0, "gid": gid}
            self.axes.fill_between(curve.x, curve.low, curve.high, **shade)
        gid = series_gid(style.key, "line")
        self.axes.plot(curve.x, curve.y, color=style.colour, linestyle=style.line, gid=gid)
        chosen = list(zip(curve.x, curve.y, strict=True))[:: math.ceil(len(curve.x) / MARKERS)]
        self.points(chosen, style, [f"{curve.row.name}, {say(x, y)}" for x, y in chosen])

    def points(self, points: Sequence[tuple[float, float]], style: Style, notes: list[str]) -> None:
        """Markers only, each with its note."""
        gid = series_gid(style.key, "points")
        x, y = zip(*points, strict=True)
        self.axes.plot(x, y, linestyle="none", gid=gid, clip_on=False, zorder=3, **style.marking)
        self._notes[gid] = notes

    def link(self, x: Sequence[float], y: Sequence[float], style: Style) -> None:
        """A faint line through points that `interval` marks."""
        gid = series_gid(style.key, "link")
        self.axes.plot(x, y, color=style.colour, linewidth=1.0, alpha=0.6, zorder=2, gid=gid)

    def interval(self, x: float, estimate: Estimate, style: Style, note: str) -> None:
        """A marker with its note, and the bar of its interval where there is one."""
        self.points([(x, estimate.value)], style, [note])
        if estimate.low is not None and estimate.high is not None:
            gid = series_gid(style.key, "bar")
            bounds = [estimate.low, estimate.high]
            self.axes.plot([x, x], bounds, color=style.colour, linewidth=1.2, zorder=2.5, gid=gid)

    def levels(self, levels: Sequence[Level]) -> None:
        """Lines across, their names right of the axes, where they hide nothing, moved apart."""
        for level in levels:
            style, gid = level.style, series_gid(level.style.key, "level")
            look: dict[str, Any] = {"color": style.colour, "linestyle": style.line, "linewidth": 1.3}
            self.axes.axhline(level.value, gid=gid, zorder=1.5, **look)
        low, high = self.axes.get_ylim()
        least, position = 0.11 * (high - low), -math.inf
        for level in sorted(levels, key=lambda each: each.value):
            position = max(level.value, position + least)
            name = level.name if len(level.name) <= LONGEST_NAME else f"{level.name[: LONGEST_NAME - 1]}…"
            self.axes.text(
                1.015, position, f"{name}\n{level.shown}", transform=self.axes.get_yaxis_transform(),
                fontsize=10.5, color=MUTED, verticalalignment="center",
                gid=series_gid(level.style.key, "name"),
            )  # fmt: skip
        self.axes.set_ylim(low, max(high, position))

    # --- axes ----------------------------------------------------------------------------------------

    def score_axis(self, which: Which, metric: Metric) -> None:
        """The axis of a metric's values; four digits where they are no shares."""
        if metric.share:
            self.percent_axis(which)
            return
        axis = getattr(self.axes, f"{which}axis")
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))

    def percent_axis(self, which: Which) -> None:
        """Shares of 1 as percentages, at round steps; none is over 100 %, where the axis may be."""
        axis = getattr(self.axes, f"{which}axis")
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{100 * value:.4g}%" if value < 1 + 1e-9 else "")
        )

    def round_axis(self) -> None:
        """Whole rounds on x."""
        self.axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
        self.axes.set_xlabel("round")

    def log_axis(self, which: Which, show: Callable[[float], str]) -> None:
        """A logarithmic axis with a label at powers of ten only, or at round numbers where those are few."""
        getattr(self.axes, f"set_{which}scale")("log")
        axis = getattr(self.axes, f"{which}axis")
        low, high = getattr(self.axes, f"get_{which}lim")()
        wide = high >= FEW_DECADES * low
        axis.set_major_locator(LogLocator(numticks=7) if wide else MaxNLocator(5, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(FuncFormatter(lambda value, _: show(value)))
        axis.set_minor_locator(NullLocator())

    def group_axis(self, names: Sequence[str]) -> None:
        """Named groups from top to bottom at 0, 1, 2, ... of y, with lines between them."""
        self.axes.set_yticks(range(len(names)), names)
        self.axes.set_yticks([i + 0.5 for i in range(len(names) - 1)], minor=True)
        self.axes.set_ylim(len(names) - 0.5, -0.5)
        self.axes.grid(False, axis="y", which="major")
        self.axes.grid(True, axis="y", which="minor")
        self.axes.tick_params(axis="y", which="both", length=0)

    def finish(self, name: str, label: str) -> Markup:
        """The figure for the page, see `inline_svg`."""
        return inline_svg(self.figure, name, label, self._notes)

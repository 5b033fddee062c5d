"""Matplotlib figures as SVG that lives inside a page: its fonts, its colours, its ids."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

from markupsafe import Markup
from matplotlib.figure import Figure

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
_PAINT = re.compile(r"(?:stroke|fill): #\w{6}")


def series_gid(key: str, part: str) -> str:
    """The gid of an artist that belongs to the series ``key``; parts are told apart by name."""
    return f"{SERIES}{key}:{part}"


def inline_svg(
    figure: Figure, name: str, label: str, notes: Mapping[str, Sequence[str]] | None = None
) -> Markup:
    """The figure as an ``<svg>`` element for HTML.

    Artists with a `series_gid` become ``<g class="series" data-series=KEY>``. Ids start with ``name``,
    so that several charts share a page.

    Args:
        figure: what was drawn, under `SETTINGS`.
        name: unique on the page.
        label: what assistive technology reads out; empty marks a decoration.
        notes: gid -> what each marker says when pointed at, in drawing order.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        _into_html(element, name)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in ("metadata", "style"):
                parent.remove(child)
        _mark_series(parent, dict(notes or {}))
    root.attrib = {"viewBox": root.attrib["viewBox"]}
    root.attrib |= {"role": "img", "aria-label": label} if label else {"aria-hidden": "true"}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _into_html(element: ElementTree.Element, name: str) -> None:
    """Drop namespaces and fonts, prefix ids and their uses, colours to variables."""
    attributes: dict[str, str] = {}
    for key, value in element.attrib.items():
        plain = key.rpartition("}")[2]
        if plain == "id" and not value.startswith(SERIES):
            value = f"{name}-{value}"
        elif plain == "href":
            value = f"#{name}-{value.removeprefix('#')}"
        elif plain == "style":
            value = _PAINT.sub(lambda m: _variable(m.group()), re.sub(r"font-family: [^;]*;? ?", "", value))
        attributes[plain] = value.replace("url(#", f"url(#{name}-")
    element.attrib = attributes
    element.tag = element.tag.rpartition("}")[2]
    element.tail = None
    if element.tag == "path":
        attributes["d"] = " ".join(attributes["d"].split())
    elif element.tag != "text":
        element.text = None


def _variable(paint: str) -> str:
    kind, colour = paint.split(": ")
    return f"{kind}: {VARIABLES.get(colour, colour)}"


def _mark_series(element: ElementTree.Element, notes: dict[str, Sequence[str]]) -> None:
    gid = element.get("id", "")
    if not gid.startswith(SERIES):
        return
    del element.attrib["id"]
    element.attrib |= {"class": "series", "data-series": gid.split(":")[1]}
    if gid in notes:
        for marker, note in zip(element.iter("use"), notes[gid], strict=True):
            ElementTree.SubElement(marker, "title").text = note

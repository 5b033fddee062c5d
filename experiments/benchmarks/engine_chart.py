"""The reference regime of `experiments.benchmarks.engine` as bars: a steady round, and the whole run."""

from __future__ import annotations

import io
from statistics import median

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.engine_cells import PRIVATE, REFERENCE, WAYS, Regime
from experiments.benchmarks.engine_figures import STEADY, WHOLE, Figures
from experiments.benchmarks.engine_table import title
from fedlora.study.report.figure import SETTINGS
from fedlora.study.report.styles import HUES, MUTED, PAPER

PANELS = ((STEADY, "seconds a round"), (WHOLE, "seconds for the whole run"))


def draw(figures: Figures) -> str:
    """An SVG; only what was measured is in it."""
    regimes = [regime for regime in (REFERENCE, PRIVATE) if figures.ways(regime)]
    with rc_context(SETTINGS):
        bars = sum(len(figures.ways(regime)) for regime in regimes)
        canvas = Figure(figsize=(11, 1.6 + 0.75 * len(regimes) + 0.36 * bars), layout="constrained")
        if regimes:
            _panels(canvas, figures, regimes)
        buffer = io.StringIO()
        canvas.savefig(buffer, format="svg", metadata={"Date": None}, facecolor=PAPER)
    return buffer.getvalue()


def _panels(canvas: Figure, figures: Figures, regimes: list[Regime]) -> None:
    heights = [len(figures.ways(regime)) for regime in regimes]
    axes = canvas.subplots(len(regimes), 2, squeeze=False, height_ratios=heights)
    for row, regime in zip(axes, regimes, strict=True):
        for panel, (key, label) in zip(row, PANELS, strict=True):
            _bars(panel, figures, regime, key)
            panel.set_xlabel(label)
        row[0].set_title(title(regime), loc="left", fontsize=12)
        row[1].set_yticklabels([])
    record = figures.runs[0]
    hw = record["hardware"]
    machine = f"{hw.get('gpu') or hw['cpu']}, {hw['cores']} cores, torch {hw['torch']}"
    canvas.supxlabel(machine, fontsize=10, color=MUTED)


def _bars(panel: Axes, figures: Figures, regime: Regime, key: str) -> None:
    ways = figures.ways(regime)
    values = [median(run[key] for run in figures.turns(regime, way)) for way in ways]
    colours = [HUES[0] if "fedlora" in WAYS[way] else MUTED for way in ways]
    drawn = panel.barh(range(len(ways)), values, color=colours, height=0.7)
    panel.bar_label(drawn, fmt="%.1f", padding=4)
    panel.set_yticks(range(len(ways)), [WAYS[way].replace("`", "") for way in ways])
    panel.tick_params(axis="y", labelcolor="black", length=0)
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.grid(axis="y", visible=False)

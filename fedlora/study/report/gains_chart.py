"""The distribution of clients' gains over a global model, and over what they reach alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedlora.study.analyse.gains import gains
from fedlora.study.analyse.summary import Row
from fedlora.study.report.figure import HEIGHT, Canvas, Chart, Numbers
from fedlora.study.report.format import signed
from fedlora.study.report.round_charts import Styles
from fedlora.study.report.styles import MUTED

MOST_SHOWN = 50
"""Clients that have a mark each; of more there are as many quantiles."""


def gains_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """A line of marks for each run and what it is held against; None where no run has gains."""
    shown = gains(rows)
    if not shown:
        return None
    canvas, body = Canvas(min(3 * HEIGHT, max(HEIGHT, 46 + 18 * len(shown)))), []
    canvas.axes.axvline(0, color=MUTED, linewidth=0.8, zorder=1)
    for place, one in enumerate(shown):
        values = sorted(one.by_client.values())
        marks = values
        if len(values) > MOST_SHOWN:
            marks = np.quantile(values, np.linspace(0, 1, MOST_SHOWN)).tolist()
        style = styles[one.name]
        canvas.link((values[0], values[-1]), (place, place), style)
        notes = [f"{one.name}, over {one.over}: {signed(value)} points" for value in marks]
        canvas.points([(value, place) for value in marks], style, notes)
        ahead = sum(value > 0 for value in values)
        body.append(
            (one.name, one.over, *map(signed, (one.mean, one.worst_decile, values[0], values[-1])),
             f"{ahead} of {len(values)}")
        )  # fmt: skip
    canvas.group_axis([f"{one.name}, over {one.over}" for one in shown])
    canvas.axes.xaxis.set_major_formatter(lambda value, _: signed(value))
    canvas.axes.set_xlabel("points")
    header = ("run", "over", "mean", "worst decile", "least", "most", "clients that gain")
    return Chart(
        name="gains",
        title="What each client gains",
        note="Accuracy of each client's own model on the test examples of its domains, less that of the "
        "global model (the run's own, else fedavg's), and of what the client reaches alone (local-only); "
        "each client a mean over the seeds.",
        svg=canvas.finish("gains", "Dot chart of the clients' gains, one line for each run and comparison"),
        figure=canvas.figure,
        numbers=Numbers(header, tuple(body)),
    )

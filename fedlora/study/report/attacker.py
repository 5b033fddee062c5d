"""The chart of what an attacker can find at most, for the claim of each run (`fedlora.privacy.trade_off`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedlora.privacy.trade_off import LOSSES, NAMED, TradeOff, curve_of
from fedlora.study.analyse.summary import Row
from fedlora.study.report.figure import Canvas, Chart, Numbers, series_gid
from fedlora.study.report.format import listed
from fedlora.study.report.styles import DOTS, MUTED, Style

DRAWN = tuple(np.geomspace(min(NAMED), 1.0, 61).tolist())
"""False positive rates of the lines."""
Curves = Sequence[tuple[Row, TradeOff]]


def trade_off_chart(rows: Sequence[Row], styles: Mapping[str, Style]) -> Chart | None:
    """True over false positive rates, a line for each run with an epsilon; None without any."""
    curves = [(r, curve) for r in rows if r.kind != "reference" and r.claim and (curve := curve_of(r.claim))]
    if not curves:
        return None
    canvas = Canvas()
    canvas.axes.plot(DRAWN, DRAWN, color=MUTED, linestyle=DOTS, linewidth=1.3)
    for row, curve in curves:
        style = styles[row.name]
        reached = list(map(curve.true_positive_rate, DRAWN))
        canvas.axes.plot(
            DRAWN, reached, color=style.colour, linestyle=style.line, gid=series_gid(style.key, "line")
        )
        points = [(rate, curve.true_positive_rate(rate)) for rate in NAMED]
        canvas.points(points, style, [f"{row.name}, {curve.said(rate)}" for rate in NAMED])
    canvas.axes.set(xlim=(DRAWN[0], 1.0), ylim=(0.0, 1.0), xlabel="of all others, accused falsely")
    canvas.log_axis("x", lambda rate: f"{100 * rate:g}%")
    canvas.percent_axis("y")
    return Chart(
        name="trade-off",
        title="What an attacker can find",
        note=_note(curves),
        svg=canvas.finish("trade-off", "Line chart: what an attacker can find over false alarms"),
        figure=canvas.figure,
        numbers=Numbers(
            ("run", *(f"at {100 * rate:g}% false alarms" for rate in NAMED), "found by"),
            tuple((row.name, *map(curve.shown, NAMED), curve.found_by) for row, curve in curves),
        ),
    )


def _note(curves: Curves) -> str:
    known = [pair for pair in curves if pair[1].found_by == LOSSES] or curves
    most, curve = max(known, key=lambda pair: pair[1].true_positive_rate(0.01))
    of = f" ({most.name})" if len(curves) > 1 else ""
    loose = [row.name for row, curve in curves if curve.found_by != LOSSES]
    loosely = f" Of {listed(loose)} only epsilon and delta are known, which allow for more." if loose else ""
    return (
        "The most members that any attack on all that was released can find, for the share of others that it "
        f"accuses falsely: {curve.said()}{of}. For the client that has spent most; dots: guessing.{loosely}"
    )

"""The charts of a report, each with the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.lines import Line2D

from fedlora.study.analyse.summary import Row
from fedlora.study.report.attacker import trade_off_chart
from fedlora.study.report.figure import (
    HEIGHT,
    SERIES,
    SETTINGS,
    Canvas,
    Chart,
    Drawing,
    Numbers,
    series_gid,
)
from fedlora.study.report.format import (
    DASH,
    in_sentence,
    interval,
    percent,
    shown,
)  # fmt: skip
from fedlora.study.report.gains_chart import gains_chart
from fedlora.study.report.round_charts import (
    Styles,
    cosine_chart,
    deltas,
    epsilon_chart,
    gap_chart,
    rank_chart,
    score_chart,
    time_chart,
    traffic_chart,
)
from fedlora.study.report.styles import styles_of
from fedlora.study.report.timeline_chart import timeline_chart

CLIENT_SHARES = {
    0.0: "worst client", 0.1: "10th percentile", 0.5: "median client", 0.9: "90th percentile",
    1.0: "best client",
}  # fmt: skip
"""Quantiles of the clients that are marked."""
MOST_IN_OVERVIEW = 14
"""Runs of the picture on the first screen."""
MOST_LETTERS, LEGEND_LINE = 54, 0.26
"""Of the names in a line of a legend outside of the page; the height of the line in inches."""
SPREAD = 0.5
"""The share of the room between two budgets in which the methods stand side by side."""


def draw_charts(rows: Sequence[Row]) -> list[Chart]:
    """All charts that the rows have data for, in the order of the page."""
    styles = styles_of(rows)
    with rc_context(SETTINGS):
        return [chart for draw in DRAWN if (chart := draw(rows, styles))]


def overview_chart(rows: Sequence[Row]) -> Chart:
    """The final scores with their intervals, named; the best first."""
    styles = styles_of(rows)
    first = sorted(rows, key=lambda row: row.metric.cost(row.score.value))[:MOST_IN_OVERVIEW]
    metric = rows[0].metric
    with rc_context(SETTINGS):
        canvas = Canvas(max(HEIGHT / 2, 46 + 22 * len(first)))
        for place, row in enumerate(first):
            estimate, style = row.score, styles[row.name]
            if estimate.low is not None and estimate.high is not None:
                canvas.axes.plot(
                    [estimate.low, estimate.high], [place, place], color=style.colour, zorder=2,
                    gid=series_gid(style.key, "bar"),
                )  # fmt: skip
            canvas.points([(estimate.value, place)], style, [f"{row.name}: {shown(estimate.value, metric)}"])
        canvas.group_axis(
            [row.name if len(row.name) < 25 else f"{row.name[:23]}\N{HORIZONTAL ELLIPSIS}" for row in first]
        )
        canvas.score_axis("x", metric)
        left_out = f", the {len(first)} {metric.best} of {len(rows)}" if len(first) < len(rows) else ""
        intervals = "" if first[0].score.low is None else ", with 95% intervals"
        return Chart(
            name="overview",
            title=f"Final {in_sentence(metric)}",
            note=f"On the whole test set{intervals}{left_out}.",
            svg=canvas.finish("overview", f"Dot chart of final {in_sentence(metric)} with intervals"),
            figure=canvas.figure,
        )


def with_legend(chart: Chart, rows: Sequence[Row]) -> Drawing:
    """The figure of a chart for use outside of the page: on white, with a legend of its runs below."""
    figure, styles = chart.figure, styles_of(rows)
    gids = [str(artist.get_gid()) for artist in figure.axes[0].get_children()]
    drawn = {gid.split(":")[1] for gid in gids if gid.startswith(SERIES)}
    with rc_context(SETTINGS):
        names = [name for name, style in styles.items() if style.key in drawn]
        lines = [
            Line2D([], [], linestyle=styles[name].line, label=name, **styles[name].marking) for name in names
        ]
        width, height = figure.get_size_inches()
        columns = max(1, min(3, MOST_LETTERS // max(map(len, names), default=1)))
        figure.set_size_inches(width, height + LEGEND_LINE * math.ceil(len(lines) / columns))
        figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=10.5)
        figure.set_facecolor("white")
    return figure


def _domains(rows: Sequence[Row], styles: Styles) -> Chart | None:
    some = [row for row in rows if row.by_domain]
    metric = rows[0].metric
    domains = list(dict.fromkeys(d for row in some for d in row.by_domain))
    if not domains:
        return None
    canvas = Canvas(min(3 * HEIGHT, max(HEIGHT, 46 + len(domains) * (14 + 8 * len(some)))))
    for index, row in enumerate(some):
        offset = 0.72 * ((index + 0.5) / len(some) - 0.5)
        found = row.by_domain
        points = [(score, domains.index(d) + offset) for d, score in found.items()]
        canvas.points(
            points, styles[row.name], [f"{row.name}, {d}: {shown(v, metric)}" for d, v in found.items()]
        )
    canvas.group_axis(domains)
    canvas.score_axis("x", metric)
    body = tuple((row.name, *(shown(row.by_domain.get(d), metric) for d in domains)) for row in some)
    return Chart(
        name="domains",
        title=f"{metric.title} by domain",
        note="Final models on the whole test set; within a domain the runs are in the order of the legend.",
        svg=canvas.finish("domains", f"Dot chart of final {in_sentence(metric)} by domain"),
        figure=canvas.figure,
        numbers=Numbers(("run", *domains), body),
    )


def _clients(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Only where it says more than the domains: where clients are more than them."""
    shown = [row for row in rows if len(row.accuracy_by_client) > len(row.by_domain)]
    if not shown:
        return None
    canvas = Canvas(min(3 * HEIGHT, max(HEIGHT, 46 + 18 * len(shown))))
    body = []
    for place, row in enumerate(shown):
        values = np.quantile(list(row.accuracy_by_client.values()), list(CLIENT_SHARES)).tolist()
        canvas.link((values[0], values[-1]), (place, place), styles[row.name])
        notes = [
            f"{row.name}, {name}: {percent(v)}"
            for name, v in zip(CLIENT_SHARES.values(), values, strict=True)
        ]
        canvas.points([(value, place) for value in values], styles[row.name], notes)
        body.append((row.name, *map(percent, values)))
    canvas.group_axis([row.name for row in shown])
    canvas.percent_axis("x")
    return Chart(
        name="clients",
        title="From the worst client to the best",
        note="Final models on each client's own test examples; each client a mean over the seeds.",
        svg=canvas.finish("clients", "Range chart of accuracy over the clients, one line for each run"),
        figure=canvas.figure,
        numbers=Numbers(("run", *CLIENT_SHARES.values()), tuple(body)),
    )


def _privacy_utility(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """The score against the budget, where some method has runs at two budgets or more."""
    frontiers = {m: f for m, f in _frontiers(rows).items() if len(f) > 1}
    if not frontiers:
        return None
    budgets = sorted({budget for frontier in frontiers.values() for budget in frontier})
    names = {b: "\N{INFINITY}" if math.isinf(b) else f"{b:g}" for b in budgets}
    canvas, body, metric = Canvas(), [], rows[0].metric
    for number, (method, frontier) in enumerate(frontiers.items()):
        offset = SPREAD * ((number + 0.5) / len(frontiers) - 0.5)
        placed = [(p + offset, n, frontier[b]) for p, (b, n) in enumerate(names.items()) if b in frontier]
        style = styles[placed[-1][2].name]
        canvas.link([place for place, _, _ in placed], [r.score.value for _, _, r in placed], style)
        said = {b: _with_interval(r) for b, r in frontier.items()}
        for place, name, row in placed:
            note = f"{method}, epsilon {name}: {_with_interval(row)}"
            canvas.interval(place, row.score, styles[row.name], note)
        body.append((method, *(said.get(budget, DASH) for budget in names)))
    canvas.axes.set_xticks(range(len(names)), list(names.values()))
    canvas.axes.set_xlabel("epsilon of the whole run, for every example of every client")
    canvas.score_axis("y", metric)
    return Chart(
        name="privacy-utility",
        title="What privacy costs",
        note=f"Final {in_sentence(metric)} on the whole test set at each budget, {deltas(rows)}. "
        "Bars are 95% intervals.",
        svg=canvas.finish(
            "privacy-utility", f"{metric.title} over the privacy budget, one series for each method"
        ),
        figure=canvas.figure,
        numbers=Numbers(("method", *(f"epsilon {name}" for name in names.values())), tuple(body)),
    )


def _with_interval(row: Row) -> str:
    bounds = interval(row.score, row.metric)
    return shown(row.score.value, row.metric) + (f" ({bounds})" if bounds else "")


def _frontiers(rows: Sequence[Row]) -> dict[str, dict[float, Row]]:
    """Per method, its rows by budget (infinite: no privacy); noise that was given by hand has none."""
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        privacy = row.config.privacy
        if row.kind != "reference" and not privacy.client_level and not privacy.noise_multiplier:
            budget = privacy.target_epsilon if row.private else math.inf
            found.setdefault(row.method, {}).setdefault(budget, row)
    return found


DRAWN = (
    score_chart, _privacy_utility, traffic_chart, time_chart, timeline_chart, gap_chart, cosine_chart,
    rank_chart, epsilon_chart, trade_off_chart, _domains, _clients, gains_chart,
)  # fmt: skip
"""In the order of the page."""

"""The charts of a report, each with the numbers behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from matplotlib import rc_context

from fedlora.study.analyse.contests import exact_and_behind
from fedlora.study.analyse.curves import (
    LOWEST_GAP,
    Curve,
    accuracy_by_bytes,
    accuracy_by_time,
    gap,
    per_round,
    sent,
    simulated,
)
from fedlora.study.analyse.summary import Row
from fedlora.study.report.attacker import trade_off_chart
from fedlora.study.report.figure import (
    DOTS,
    HEIGHT,
    SETTINGS,
    Canvas,
    Chart,
    Level,
    Numbers,
    Style,
    styles_of,
)  # fmt: skip
from fedlora.study.report.format import (
    DASH,
    duration,
    interval,
    listed,
    megabytes,
    percent,
    power_of_ten,
    significant,
)  # fmt: skip

Styles = Mapping[str, Style]
Show = Callable[[float], str]
CLIENT_SHARES = {
    0.0: "worst client", 0.1: "10th percentile", 0.5: "median client", 0.9: "90th percentile",
    1.0: "best client",
}  # fmt: skip
"""Quantiles of the clients that are marked."""
SPREAD = 0.5
"""The share of the room between two budgets in which the methods stand side by side."""


def draw_charts(rows: Sequence[Row]) -> list[Chart]:
    """All charts that the rows have data for, in the order of the page."""
    styles = styles_of(rows)
    with rc_context(SETTINGS):
        return [chart for draw in DRAWN if (chart := draw(rows, styles))]


# --- over the rounds ---------------------------------------------------------------------------------


def _accuracy(rows: Sequence[Row], styles: Styles) -> Chart | None:
    return _lines(
        styles, _curves(rows, lambda row: per_round(row, "accuracy")), percent,
        name="accuracy", title="Accuracy after each round",
        note=f"On the test examples of a round's evaluation; level lines are final accuracies on all "
        f"{rows[0].examples:,}.",
        adorn=lambda canvas: _accuracy_axis(canvas, rows, styles),
    )  # fmt: skip


def _traffic(rows: Sequence[Row], styles: Styles) -> Chart | None:
    def adorn(canvas: Canvas) -> None:
        _accuracy_axis(canvas, rows, styles)
        canvas.log_axis("x", lambda value: f"{value:,g}")
        canvas.axes.set_xlabel("megabytes sent by and to all clients so far")

    return _lines(
        styles, [c for c in _curves(rows, accuracy_by_bytes) if min(c.x) > 0], percent,
        name="traffic", title="Accuracy for what was sent",
        note="Up and down together, on a logarithmic axis; further left is cheaper.", adorn=adorn,
        numbers=_by_round(_curves(rows, sent), lambda value: f"{megabytes(1e6 * value)} MB"),
        place=lambda x: f"{megabytes(1e6 * x)} MB:",
    )  # fmt: skip


def _time(rows: Sequence[Row], styles: Styles) -> Chart | None:
    def adorn(canvas: Canvas) -> None:
        _accuracy_axis(canvas, rows, styles)
        canvas.log_axis("x", lambda value: duration(3600 * value))
        canvas.axes.set_xlabel("simulated time")

    return _lines(
        styles, [c for c in _curves(rows, accuracy_by_time) if min(c.x) > 0], percent,
        name="time", title="Accuracy over simulated time",
        note="What the configured devices and networks would take, on a logarithmic axis; further left is "
        "sooner. No device was measured.", adorn=adorn,
        numbers=_by_round(_curves(rows, simulated), lambda value: duration(3600 * value)),
        place=lambda x: f"{duration(3600 * x)}:",
    )  # fmt: skip


def _gap(rows: Sequence[Row], styles: Styles) -> Chart | None:
    return _lines(
        styles, _curves(rows, gap),
        lambda value: f"at most {power_of_ten(-9)}" if value <= LOWEST_GAP else significant(value),
        name="gap", title="Aggregation gap",
        note="How far the new global weights are from what the clients' mean asked for, relative to it; on a "
        f"logarithmic axis that ends at {power_of_ten(-9)}. Exact methods stay near {power_of_ten(-7)}, the "
        f"rounding of 32-bit numbers.{_exact_and_behind(rows)}",
        adorn=lambda canvas: canvas.log_axis("y", significant),
    )  # fmt: skip


def _exact_and_behind(rows: Sequence[Row]) -> str:
    """Caption where a run without a gap is behind all the same."""
    said = "no gap, and yet behind. A gap says what averaging lost, not whether what was asked for was good"
    behind = exact_and_behind(rows)
    return f" {listed(behind)}: {said}: the reason is elsewhere." if behind else ""


def _cosine(rows: Sequence[Row], styles: Styles) -> Chart | None:
    return _lines(
        styles, _curves(rows, lambda row: per_round(row, "cosine")), significant,
        name="cosine", title="Do clients agree?",
        note="Mean cosine between the changes of two clients. Near 1 they ask for the same; near 0 for "
        "unrelated changes, and averages of factors lose what averages of products keep.",
    )  # fmt: skip


def _rank(rows: Sequence[Row], styles: Styles) -> Chart | None:
    return _lines(
        styles, _curves(rows, lambda row: per_round(row, "effective_rank")), significant,
        name="effective-rank", title="How many directions the clients ask for",
        note="Effective rank of the clients' mean change, a mean over layers. Above the adapter's own rank, "
        "no adapter can hold what is asked for, and the rest is dropped or goes into the base.",
    )  # fmt: skip


def _epsilon(rows: Sequence[Row], styles: Styles) -> Chart | None:
    rows = [row for row in rows if row.private]
    privacy = [row.config.privacy for row in rows]
    budgets = sorted({p.target_epsilon for p in privacy if not p.noise_multiplier})

    def adorn(canvas: Canvas) -> None:
        canvas.axes.set_ylim(bottom=0)
        canvas.levels([Level("budget", b, f"{b:g}", Style(key=f"budget-{b:g}", line=DOTS)) for b in budgets])

    return _lines(
        styles, _curves(rows, lambda row: per_round(row, "epsilon")), lambda value: f"{value:.2f}",
        name="epsilon", title="Privacy spent",
        note=f"Epsilon at {_delta(rows)} of the client that has spent most; example-level, "
        "per client. Runs with the same noise, sample rate and steps spend the same, their lines coincide.",
        adorn=adorn, place=lambda x: f"round {x:.0f}: epsilon",
    )  # fmt: skip


def _lines(
    styles: Styles,
    curves: Sequence[Curve],
    show: Show,
    *,
    name: str,
    title: str,
    note: str,
    adorn: Callable[[Canvas], None] = lambda canvas: None,
    numbers: Numbers | None = None,
    place: Show = lambda x: f"round {x:.0f}:",
) -> Chart | None:
    """A line for each run, with levels and axes by ``adorn``; None without any."""
    if not curves:
        return None
    canvas = Canvas()
    canvas.round_axis()
    for curve in curves:
        canvas.curve(curve, styles[curve.row.name], lambda x, y: f"{place(x)} {show(y)}")
    adorn(canvas)
    several = any(len(curve.row.seeds) > 1 for curve in curves)
    bands = " Lines are means over the seeds, bands reach from the lowest to the highest." if several else ""
    return Chart(
        name=name,
        title=title,
        note=note + bands,
        svg=canvas.finish(name, f"Line chart: {title}, one line for each run"),
        numbers=numbers or _by_round(curves, show),
    )


def _curves(rows: Sequence[Row], of: Callable[[Row], Curve | None]) -> list[Curve]:
    return [curve for row in rows if row.kind != "reference" and (curve := of(row)) is not None]


def _accuracy_axis(canvas: Canvas, rows: Sequence[Row], styles: Styles) -> None:
    """Percent, with the references and what needs no training at their accuracy on the whole test set."""
    name = "majority" if rows[0].unit == "example" else "before training"
    value = rows[0].reference[1]
    levels = [Level(name, value, percent(value), Style(key="majority", line=DOTS))]
    for row in rows:
        if row.kind == "reference":
            levels.append(Level(row.name, row.accuracy.value, percent(row.accuracy.value), styles[row.name]))
    canvas.levels(levels)
    canvas.percent_axis("y")


def _by_round(curves: Sequence[Curve], show: Show) -> Numbers:
    values = [dict(zip(curve.rounds, curve.y, strict=True)) for curve in curves]
    numbers = sorted({number for curve in curves for number in curve.rounds})
    body = [(str(n), *(show(v[n]) if n in v else "" for v in values)) for n in numbers]
    return Numbers(("round", *(curve.row.name for curve in curves)), tuple(body))


# --- final models ------------------------------------------------------------------------------------


def _domains(rows: Sequence[Row], styles: Styles) -> Chart | None:
    shown = [row for row in rows if row.accuracy_by_domain]
    domains = list(dict.fromkeys(d for row in shown for d in row.accuracy_by_domain))
    if not domains:
        return None
    canvas = Canvas(min(3 * HEIGHT, max(HEIGHT, 46 + len(domains) * (14 + 8 * len(shown)))))
    for index, row in enumerate(shown):
        offset = 0.72 * ((index + 0.5) / len(shown) - 0.5)
        found = row.accuracy_by_domain
        points = [(accuracy, domains.index(d) + offset) for d, accuracy in found.items()]
        canvas.points(points, styles[row.name], [f"{row.name}, {d}: {percent(v)}" for d, v in found.items()])
    canvas.group_axis(domains)
    canvas.percent_axis("x")
    body = tuple((row.name, *(percent(row.accuracy_by_domain.get(d)) for d in domains)) for row in shown)
    return Chart(
        name="domains",
        title="Accuracy by domain",
        note="Final models on the whole test set; within a domain the runs are in the order of the legend.",
        svg=canvas.finish("domains", "Dot chart of final accuracy by domain"),
        numbers=Numbers(("run", *domains), body),
    )


def _clients(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Only where it says more than the domains: where clients are more than them."""
    shown = [row for row in rows if len(row.accuracy_by_client) > len(row.accuracy_by_domain)]
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
        numbers=Numbers(("run", *CLIENT_SHARES.values()), tuple(body)),
    )


def _privacy_utility(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Accuracy against the budget, where some method has runs at two budgets or more."""
    frontiers = {m: f for m, f in _frontiers(rows).items() if len(f) > 1}
    if not frontiers:
        return None
    budgets = sorted({budget for frontier in frontiers.values() for budget in frontier})
    names = {b: "\N{INFINITY}" if math.isinf(b) else f"{b:g}" for b in budgets}
    canvas, body = Canvas(), []
    for number, (method, frontier) in enumerate(frontiers.items()):
        offset = SPREAD * ((number + 0.5) / len(frontiers) - 0.5)
        placed = [(p + offset, n, frontier[b]) for p, (b, n) in enumerate(names.items()) if b in frontier]
        style = styles[placed[-1][2].name]
        canvas.link([place for place, _, _ in placed], [r.accuracy.value for _, _, r in placed], style)
        shown = {b: f"{percent(r.accuracy.value)} ({interval(r.accuracy)})" for b, r in frontier.items()}
        for place, name, row in placed:
            note = f"{method}, epsilon {name}: {percent(row.accuracy.value)} ({interval(row.accuracy)})"
            canvas.interval(place, row.accuracy, styles[row.name], note)
        body.append((method, *(shown.get(budget, DASH) for budget in names)))
    canvas.axes.set_xticks(range(len(names)), list(names.values()))
    canvas.axes.set_xlabel("epsilon of the whole run, for every example of every client")
    canvas.percent_axis("y")
    return Chart(
        name="privacy-utility",
        title="What privacy costs",
        note=f"Final accuracy on the whole test set at each budget, {_delta(rows)}. Bars are 95% intervals.",
        svg=canvas.finish("privacy-utility", "Accuracy over the privacy budget, one series for each method"),
        numbers=Numbers(("method", *(f"epsilon {name}" for name in names.values())), tuple(body)),
    )


def _frontiers(rows: Sequence[Row]) -> dict[str, dict[float, Row]]:
    """Per method, its rows by budget (infinite: no privacy); noise that was given by hand has none."""
    found: dict[str, dict[float, Row]] = {}
    for row in rows:
        privacy = row.config.privacy
        if row.kind != "reference" and not privacy.client_level and not privacy.noise_multiplier:
            budget = privacy.target_epsilon if row.private else math.inf
            found.setdefault(row.method, {}).setdefault(budget, row)
    return found


def _delta(rows: Iterable[Row]) -> str:
    deltas = sorted({row.config.privacy.target_delta for row in rows if row.private})
    return f"delta {listed([*map(significant, deltas)])}"


DRAWN = (
    _accuracy, _privacy_utility, _traffic, _time, _gap, _cosine, _rank, _epsilon, trade_off_chart, _domains,
    _clients,
)  # fmt: skip
"""In the order of the page."""

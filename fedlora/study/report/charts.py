"""The charts of a report, each with the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import rc_context

from fedlora.study.analyse.curves import LOWEST_GAP, Curve, accuracy_by_bytes, gap, per_round, sent
from fedlora.study.analyse.summary import Row
from fedlora.study.report.figure import DOTS, HEIGHT, Canvas, Chart, Level, Numbers, Style, styles_of
from fedlora.study.report.format import megabytes, percent, power_of_ten, significant
from fedlora.study.report.privacy_utility import draw_privacy_utility
from fedlora.study.report.svg import SETTINGS

Styles = dict[str, Style]
CLIENT_SHARES = (0.0, 0.1, 0.5, 0.9, 1.0)
"""Quantiles of the clients that are marked."""


def draw_charts(rows: Sequence[Row]) -> list[Chart]:
    """All charts that the rows have data for, in the order of the page."""
    styles = styles_of(rows)
    with rc_context(SETTINGS):
        charts = [draw(rows, styles) for draw in DRAWN]
    return [chart for chart in charts if chart is not None]


def _accuracy(rows: Sequence[Row], styles: Styles) -> Chart | None:
    curves = _curves(rows, lambda row: per_round(row, "accuracy"))
    if not curves:
        return None
    canvas = Canvas()
    for curve in curves:
        canvas.curve(curve, styles[curve.row.name], lambda x, y: f"round {x:.0f}: {percent(y)}")
    canvas.levels(_levels(rows, styles))
    canvas.percent_axis("y")
    canvas.round_axis()
    return Chart(
        name="accuracy",
        title="Accuracy after each round",
        note=f"On {_evaluated(curves)} test examples; level lines are final accuracies on all "
        f"{rows[0].examples:,}.{_bands(curves)}",
        svg=canvas.finish("accuracy", "Line chart of accuracy by round, one line for each run"),
        numbers=_by_round(curves, percent),
    )


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
    return Chart(
        name="domains",
        title="Accuracy by domain",
        note="Final models on the whole test set; within a domain the runs are in the order of the legend.",
        svg=canvas.finish("domains", "Dot chart of final accuracy by domain"),
    )


def _clients(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Only where it says more than the domains: where clients are more than them."""
    shown = [row for row in rows if len(row.accuracy_by_client) > len(row.accuracy_by_domain)]
    if not shown:
        return None
    canvas = Canvas(min(3 * HEIGHT, max(HEIGHT, 46 + 18 * len(shown))))
    for place, row in enumerate(shown):
        values = sorted(row.accuracy_by_client.values())
        style = styles[row.name]
        canvas.link((values[0], values[-1]), (place, place), style)
        chosen = dict(zip(CLIENT_SHARES, np.quantile(values, CLIENT_SHARES).tolist(), strict=True))
        notes = [f"{row.name}, {_named_share(share)}: {percent(v)}" for share, v in chosen.items()]
        canvas.points([(value, place) for value in chosen.values()], style, notes)
    canvas.group_axis([row.name for row in shown])
    canvas.percent_axis("x")
    return Chart(
        name="clients",
        title="From the worst client to the best",
        note="Accuracy of the final model on each client's own test examples: the worst client, the tenth "
        "percentile, the median, the ninetieth percentile and the best; each client a mean over the seeds.",
        svg=canvas.finish("clients", "Range chart of accuracy over the clients, one line for each run"),
    )


def _named_share(share: float) -> str:
    return {0.0: "worst client", 0.5: "median client", 1.0: "best client"}.get(
        share, f"{100 * share:.0f}th percentile"
    )


def _traffic(rows: Sequence[Row], styles: Styles) -> Chart | None:
    curves = [c for c in _curves(rows, accuracy_by_bytes) if min(c.x) > 0]
    if not curves:
        return None
    canvas = Canvas()
    for curve in curves:
        canvas.curve(curve, styles[curve.row.name], lambda x, y: f"{megabytes(1e6 * x)} MB: {percent(y)}")
    canvas.levels(_levels(rows, styles))
    canvas.percent_axis("y")
    canvas.log_axis("x", lambda value: f"{value:,g}")
    canvas.axes.set_xlabel("megabytes sent by and to all clients so far")
    return Chart(
        name="traffic",
        title="Accuracy for what was sent",
        note="Up and down together, on a logarithmic axis; further left is cheaper.",
        svg=canvas.finish("traffic", "Line chart of accuracy over megabytes sent, one line for each run"),
        numbers=_by_round(_curves(rows, sent), lambda value: f"{megabytes(1e6 * value)} MB"),
    )


def _gap(rows: Sequence[Row], styles: Styles) -> Chart | None:
    curves = _curves(rows, gap)
    if not curves:
        return None
    canvas = Canvas()
    for curve in curves:
        canvas.curve(curve, styles[curve.row.name], lambda x, y: f"round {x:.0f}: {_shown_gap(y)}")
    canvas.log_axis("y", significant)
    canvas.round_axis()
    return Chart(
        name="gap",
        title="Aggregation gap",
        note="How far the new global weights are from what the clients' mean asked for, relative to it; on a "
        f"logarithmic axis that ends at {power_of_ten(-9)}. Exact methods stay near {power_of_ten(-7)}, the "
        f"rounding of 32-bit numbers.{_bands(curves)}",
        svg=canvas.finish("gap", "Line chart of the aggregation gap by round, one line for each run"),
        numbers=_by_round(curves, _shown_gap),
    )


def _cosine(rows: Sequence[Row], styles: Styles) -> Chart | None:
    return _diagnostic(
        rows,
        styles,
        key="cosine",
        title="Do clients agree?",
        note="Mean cosine between the changes of two clients. Near 1 they ask for the same; near 0 for "
        "unrelated changes, and averages of factors lose what averages of products keep.",
    )


def _rank(rows: Sequence[Row], styles: Styles) -> Chart | None:
    return _diagnostic(
        rows,
        styles,
        key="effective_rank",
        title="How many directions the clients ask for",
        note="Effective rank of the clients' mean change, a mean over layers. Above the adapter's own rank, "
        "no adapter can hold what is asked for, and the rest is dropped or goes into the base.",
    )


def _diagnostic(rows: Sequence[Row], styles: Styles, *, key: str, title: str, note: str) -> Chart | None:
    curves = _curves(rows, lambda row: per_round(row, key))
    if not curves:
        return None
    canvas = Canvas()
    for curve in curves:
        canvas.curve(curve, styles[curve.row.name], lambda x, y: f"round {x:.0f}: {significant(y)}")
    canvas.axes.set_ylabel(key.replace("_", " "))
    canvas.round_axis()
    name = key.replace("_", "-")
    return Chart(
        name=name,
        title=title,
        note=f"{note}{_bands(curves)}",
        svg=canvas.finish(name, f"Line chart of the {key.replace('_', ' ')} by round, one line for each run"),
        numbers=_by_round(curves, significant),
    )


def _epsilon(rows: Sequence[Row], styles: Styles) -> Chart | None:
    curves = [c for c in _curves(rows, lambda row: per_round(row, "epsilon")) if c.row.private]
    if not curves:
        return None
    canvas = Canvas()
    for curve in curves:
        canvas.curve(curve, styles[curve.row.name], lambda x, y: f"round {x:.0f}: epsilon {y:.2f}")
    privacy = [c.row.config.privacy for c in curves]
    budgets = sorted({p.target_epsilon for p in privacy if not p.noise_multiplier})
    canvas.axes.set_ylim(bottom=0)
    canvas.levels([Level(f"budget {b:g}", b, Style(key=f"budget-{b:g}", line=DOTS)) for b in budgets])
    canvas.axes.set_ylabel("epsilon")
    canvas.round_axis()
    deltas = " and ".join(significant(delta) for delta in sorted({p.target_delta for p in privacy}))
    return Chart(
        name="epsilon",
        title="Privacy spent",
        note=f"Epsilon at delta {deltas} of the client that has spent most; example-level, per client. Runs "
        "with the same noise, sample rate and steps spend the same, their lines coincide.",
        svg=canvas.finish("epsilon", "Line chart of epsilon by round, one line for each private run"),
        numbers=_by_round(curves, lambda value: f"{value:.2f}"),
    )


# --- pieces ------------------------------------------------------------------------------------------


def _curves(rows: Sequence[Row], of: Callable[[Row], Curve | None]) -> list[Curve]:
    return [curve for row in rows if row.kind != "reference" and (curve := of(row)) is not None]


def _levels(rows: Sequence[Row], styles: Styles) -> list[Level]:
    """The references and what needs no training at their accuracy on the whole test set."""
    value = rows[0].reference[1]
    name = "majority" if rows[0].unit == "example" else "before training"
    levels = [Level(f"{name} {percent(value)}", value, Style(key="majority", line=DOTS))]
    for row in rows:
        if row.kind == "reference":
            value = row.accuracy.value
            levels.append(Level(f"{row.name} {percent(value)}", value, styles[row.name]))
    return levels


def _shown_gap(value: float) -> str:
    return f"at most {power_of_ten(-9)}" if value <= LOWEST_GAP else significant(value)


def _by_round(curves: Sequence[Curve], show: Callable[[float], str]) -> Numbers:
    values = [dict(zip(curve.rounds, curve.y, strict=True)) for curve in curves]
    numbers = sorted({number for curve in curves for number in curve.rounds})
    body = [(str(n), *(show(v[n]) if n in v else "" for v in values)) for n in numbers]
    return Numbers(("round", *(curve.row.name for curve in curves)), tuple(body))


def _evaluated(curves: Sequence[Curve]) -> str:
    """How many test examples the rounds' evaluations took."""
    records = [record for curve in curves for run in curve.row.results for record in run.rounds]
    counts = sorted({record["examples"] for record in records if record.get("examples")})
    return " or ".join(f"{count:,}" for count in counts)


def _bands(curves: Sequence[Curve]) -> str:
    several = any(len(curve.row.seeds) > 1 for curve in curves)
    return " Lines are means over the seeds, bands reach from the lowest to the highest." if several else ""


DRAWN = (_accuracy, draw_privacy_utility, _traffic, _gap, _cosine, _rank, _epsilon, _domains, _clients)
"""In the order of the page."""

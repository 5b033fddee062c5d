"""Charts over the rounds of a study's runs, each with the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from fedlora.study.analyse.contests import exact_and_behind
from fedlora.study.analyse.curves import (
    LOWEST_GAP,
    Curve,
    gap,
    per_round,
    score_over,
    sent,
    simulated,
)
from fedlora.study.analyse.summary import Row
from fedlora.study.report.figure import Canvas, Chart, Level, Numbers
from fedlora.study.report.format import (
    duration,
    listed,
    megabytes,
    power_of_ten,
    shown,
    significant,
)  # fmt: skip
from fedlora.study.report.styles import DOTS, Style
from fedlora.tasks.metrics import Metric

Styles = Mapping[str, Style]
Show = Callable[[float], str]


def score_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """What the runs are judged by, after each round."""
    metric = rows[0].metric
    return _lines(
        styles, _curves(rows, lambda row: per_round(row, metric.name)), _show(metric),
        name=metric.name, title=f"{metric.title} after each round",
        note=f"On the test examples of a round's evaluation; level lines are final values on all "
        f"{rows[0].examples:,}.{_lower(metric)}",
        adorn=lambda canvas: _score_axis(canvas, rows, styles),
    )  # fmt: skip


def _show(metric: Metric) -> Show:
    return lambda score: shown(score, metric)


def _lower(metric: Metric) -> str:
    return " Lower is better." if metric.lower else ""


def traffic_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """The score over the bytes that were sent."""
    metric = rows[0].metric

    def adorn(canvas: Canvas) -> None:
        _score_axis(canvas, rows, styles)
        canvas.log_axis("x", lambda value: f"{value:,g}")
        canvas.axes.set_xlabel("megabytes sent by and to all clients so far")

    return _lines(
        styles, _score_over(rows, sent), _show(metric),
        name="traffic", title=f"{metric.title} for what was sent",
        note=f"Up and down together, on a logarithmic axis; further left is cheaper.{_lower(metric)}",
        adorn=adorn,
        numbers=_by_round(_curves(rows, sent), lambda value: f"{megabytes(1e6 * value)} MB"),
        place=lambda x: f"{megabytes(1e6 * x)} MB:",
    )  # fmt: skip


def time_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """The score over simulated time, where it was simulated."""
    metric = rows[0].metric

    def adorn(canvas: Canvas) -> None:
        _score_axis(canvas, rows, styles)
        canvas.log_axis("x", lambda value: duration(3600 * value))
        canvas.axes.set_xlabel("simulated time")

    return _lines(
        styles, _score_over(rows, simulated), _show(metric),
        name="time", title=f"{metric.title} over simulated time",
        note="What the configured devices and networks would take, on a logarithmic axis; further left is "
        f"sooner. No device was measured.{_lower(metric)}", adorn=adorn,
        numbers=_by_round(_curves(rows, simulated), lambda value: duration(3600 * value)),
        place=lambda x: f"{duration(3600 * x)}:",
    )  # fmt: skip


def gap_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Aggregation gap a round."""
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


def cosine_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Cosine between clients' changes."""
    return _lines(
        styles, _curves(rows, lambda row: per_round(row, "cosine")), significant,
        name="cosine", title="Do clients agree?",
        note="Mean cosine between the changes of two clients. Near 1 they ask for the same; near 0 for "
        "unrelated changes, and averages of factors lose what averages of products keep.",
    )  # fmt: skip


def rank_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Effective rank of the clients' mean change."""
    return _lines(
        styles, _curves(rows, lambda row: per_round(row, "effective_rank")), significant,
        name="effective-rank", title="How many directions the clients ask for",
        note="Effective rank of the clients' mean change, a mean over layers. Above the adapter's own rank, "
        "no adapter can hold what is asked for, and the rest is dropped or goes into the base.",
    )  # fmt: skip


def epsilon_chart(rows: Sequence[Row], styles: Styles) -> Chart | None:
    """Epsilon spent a round, beside the budgets."""
    rows = [row for row in rows if row.private]
    privacy = [row.config.privacy for row in rows]
    budgets = sorted({p.target_epsilon for p in privacy if not p.noise_multiplier})

    def adorn(canvas: Canvas) -> None:
        canvas.axes.set_ylim(bottom=0)
        canvas.levels([Level("budget", b, f"{b:g}", Style(key=f"budget-{b:g}", line=DOTS)) for b in budgets])

    hidden = listed(list(dict.fromkeys(p.granularity for p in privacy)))
    return _lines(
        styles, _curves(rows, lambda row: per_round(row, "epsilon")), lambda value: f"{value:.2f}",
        name="epsilon", title="Privacy spent",
        note=f"Epsilon at {deltas(rows)} of the client that has spent most, for each {hidden} of it. Runs "
        "with the same noise, sample rate and steps spend the same, their lines coincide.",
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
        figure=canvas.figure,
        numbers=numbers or _by_round(curves, show),
    )


def _curves(rows: Sequence[Row], of: Callable[[Row], Curve | None]) -> list[Curve]:
    return [curve for row in rows if row.kind != "reference" and (curve := of(row)) is not None]


def _score_over(rows: Sequence[Row], progress: Callable[[Row], Curve | None]) -> list[Curve]:
    """The score over a series that a logarithmic axis can show."""
    return [c for c in _curves(rows, lambda row: score_over(row, progress(row))) if min(c.x) > 0]


def _score_axis(canvas: Canvas, rows: Sequence[Row], styles: Styles) -> None:
    """The axis of the score, with the references and what needs no training on the whole test set."""
    metric, value = rows[0].metric, rows[0].reference[1]
    before = "before training" if rows[0].results[0].result.get("before") else metric.level
    levels = [Level(before, value, shown(value, metric), Style(key="majority", line=DOTS))]
    for row in rows:
        if row.kind == "reference":
            score = row.score.value
            levels.append(Level(row.name, score, shown(score, metric), styles[row.name]))
    canvas.levels(levels)
    canvas.score_axis("y", metric)


def _by_round(curves: Sequence[Curve], show: Show) -> Numbers:
    values = [dict(zip(curve.rounds, curve.y, strict=True)) for curve in curves]
    numbers = sorted({number for curve in curves for number in curve.rounds})
    body = [(str(n), *(show(v[n]) if n in v else "" for v in values)) for n in numbers]
    return Numbers(("round", *(curve.row.name for curve in curves)), tuple(body))


def deltas(rows: Iterable[Row]) -> str:
    """The deltas of private rows, in words."""
    deltas = sorted({row.config.privacy.target_delta for row in rows if row.private})
    return f"delta {listed([*map(significant, deltas)])}"

"""The report of a study: one HTML file that needs nothing else, neither network nor fonts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from fedlora.core.files import write_atomic
from fedlora.errors import ConfigError
from fedlora.server.records import SETS
from fedlora.study.analyse.comparisons import ALIKE, Comparison, compare
from fedlora.study.analyse.contests import contests
from fedlora.study.analyse.gains import gains
from fedlora.study.analyse.intervals import Estimate
from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import CONTROL, Row, summarise
from fedlora.study.analyse.tuning import Tuning
from fedlora.study.plan.absent import Absent
from fedlora.study.report import configuration, format
from fedlora.study.report.charts import draw_charts, overview_chart
from fedlora.study.report.figure import swatch
from fedlora.study.report.findings import claim, claims, claims_header, find, worthwhile
from fedlora.study.report.styles import styles_of
from fedlora.study.report.tables import write_tables
from fedlora.tasks.metrics import ACCURACY, Metric

EMPTY = (format.DASH, None, "")
NEVER = ("never", None, "")


def write_report(
    path: Path,
    title: str,
    results: Sequence[CellResult],
    pairs: str = "",
    *,
    absent: Sequence[Absent] = (),
    tuning: Tuning | None = None,
    looks: Sequence[int] = (),
    target: float = 0.0,
    metric: str = "",
) -> None:
    """Write the report of these runs to ``path`` and the tables beside it; the same runs give the same bytes.

    Args:
        path: of the page.
        title: its heading.
        results: the runs.
        pairs: ``study.comparisons``.
        absent: the runs of the study that have no result.
        tuning: how their learning rates were found, if the study did that.
        looks: with how many seeds there was a report before.
        target: ``study.target-accuracy``.
        metric: by which the runs are judged; empty is the first of their task.

    Raises:
        ConfigError: there is no run to report on.
    """
    if not results:
        raise ConfigError(f"{path}: there is no finished run to report on")
    rows = summarise(results, metric)
    comparisons = compare(rows, pairs, [missing.method for missing in absent])
    write_tables(path.parent, results, comparisons, rows[0].metric)
    write_atomic(path, render(title, results, comparisons, absent, tuning, looks, target, metric))


def write_page(path: Path, title: str, results: Sequence[CellResult]) -> None:
    """The page of the run whose directory it lies in, without tables and claims."""
    write_atomic(path, render(title, results, folder="./"))


def render(
    title: str,
    results: Sequence[CellResult],
    comparisons: Sequence[Comparison] = (),
    absent: Sequence[Absent] = (),
    tuning: Tuning | None = None,
    looks: Sequence[int] = (),
    target: float = 0.0,
    metric: str = "",
    *,
    folder: str = "",
) -> str:
    """The report as HTML; ``folder`` is where a run's files are, by default the one named after it."""
    rows = summarise(results, metric)
    shared = configuration.shared_config(rows)
    styles = styles_of(rows)
    environment = Environment(
        loader=PackageLoader("fedlora.study.report", "page"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(format, name) for name in ("shown", "duration", "significant")}
    return environment.get_template("report.html").render(
        title=title,
        metric=rows[0].metric,
        score=format.in_sentence(rows[0].metric),
        worth=worthwhile(rows[0]),
        alike=format.size(ALIKE * rows[0].scale, rows[0].metric),
        findings=find(rows, looks),
        claims=claims(comparisons),
        claims_header=claims_header(rows[0].metric),
        claims_table=[claim(comparison) for comparison in comparisons],
        table=_table(rows, target),
        legend=[(styles[row.name].key, swatch(styles[row.name]), row.name) for row in rows],
        overview=overview_chart(rows),
        charts=draw_charts(rows),
        folder=folder,
        differing=configuration.differing(rows, shared),
        details=[_detail(row, shared) for row in rows],
        facts=configuration.facts(rows),
        keys=configuration.shared_keys(shared),
        absent=configuration.without_result(absent, len(results)),
        learning_rates=configuration.learning_rates(rows),
        tuned=configuration.tuned(tuning, rows),
        origins=configuration.origins(results),
        provenances=configuration.provenances(results),
    )


# --- the table of all runs ---------------------------------------------------------------------------

RANK = ("Perplexity", "Epsilon", "MB up", "Time", "Gap")
"""Columns that stay the longest where room is short, after the score's own; the others go first."""
Value = tuple[str, float | None, str]
"""A cell of the sortable table: what is read, the number it is sorted by (None sorts last), small print."""
Column = Mapping[str, Value]
"""By the name of the row; a row that is not there has nothing to show."""


def _table(rows: Sequence[Row], target: float) -> dict[str, Any]:
    """The sortable table: its columns, a line for each row, and one for what needs no training."""
    metric, against = rows[0].metric, _against(rows)
    columns = {
        "Perplexity": _column(rows, lambda row: row.perplexity, format.significant),
        metric.title: {row.name: _estimate(row.score, metric) for row in rows},
        **_sets(rows),
        **against,
        "Worst client": {row.name: _estimate(row.worst_client) for row in rows if row.worst_client},
        "Worst decile": {row.name: _estimate(row.worst_decile) for row in rows if row.worst_decile},
        **_gains(rows),
        "MB up": _column(rows, lambda row: row.bytes_up, format.megabytes),
        "MB down": _column(rows, lambda row: row.bytes_down, format.megabytes),
        "Gap": _column(rows, lambda row: row.gap, format.significant),
        "Intruders": _column(rows, lambda row: row.intruders, format.percent),
        "Epsilon": {row.name: _epsilon(row.epsilon, row) for row in rows if row.epsilon is not None},
        **_until(rows, target),
        "Simulated time": _column(rows, lambda row: row.simulated_seconds, format.duration),
        "Time": _column(rows, lambda row: row.seconds, format.duration),
    }  # fmt: skip
    columns = {name: column for name, column in columns.items() if column}
    lines = [
        (row.name, _kind(row), [column.get(row.name, EMPTY) for column in columns.values()]) for row in rows
    ]
    for name, score in dict.fromkeys(row.reference for row in rows):
        first = next(row for row in rows if row.reference == (name, score))
        before = (first.results[0].result.get("before") or {}).get("perplexity")
        known = {
            metric.title: _estimate(Estimate(value=score), metric),
            "Perplexity": (format.significant(before), before, ""),
        }
        lines.append((name, "untrained", [known.get(column, EMPTY) for column in columns]))
    scores = [name for name in columns if name == metric.title or name in against]
    kept = [*scores, *RANK]
    rank = {name: kept.index(name) if name in kept else len(kept) for name in columns}
    lower = {name for name in columns if metric.lower and (name in scores or name.startswith("On "))}
    return {"columns": [(name, rank[name], name in lower) for name in columns], "lines": lines}


def _column(rows: Sequence[Row], of: Callable[[Row], float | None], show: Callable[[float], str]) -> Column:
    return {row.name: (show(value), value, "") for row in rows if (value := of(row)) is not None}


def _estimate(estimate: Estimate, metric: Metric = ACCURACY) -> Value:
    return format.shown(estimate.value, metric), estimate.value, format.interval(estimate, metric)


def _sets(rows: Sequence[Row]) -> dict[str, Column]:
    """Mean score over the runs on each set of ``data.evaluation-sets``."""
    found: dict[str, Column] = {}
    for row in rows:
        first = row.results[0].result.get(SETS) or {}
        for name in first:
            value = fmean(run.result[SETS][name][row.metric.name] for run in row.results)
            found[f"On {name}"] = {
                **found.get(f"On {name}", {}),
                row.name: (format.shown(value, row.metric), value, ""),
            }
    return found


def _against(rows: Sequence[Row]) -> dict[str, Column]:
    """Differences within each contest: to the best, and to the head alone."""
    metric = rows[0].metric
    best: dict[str, Value] = {}
    control: dict[str, Value] = {}
    for contest in contests(rows):
        first, *others = contest.rows
        for row in others:
            best[row.name] = _difference(contest.difference(row, first), metric)
            best[first.name] = (metric.best, 0.0, "")
        for row in contest.rows:
            if contest.control and row is not contest.control:
                control[row.name] = _difference(contest.difference(row, contest.control), metric)
    return {f"To the {metric.best}": best, f"{'Against' if metric.lower else 'Over'} {CONTROL}": control}


def _gains(rows: Sequence[Row]) -> dict[str, Column]:
    """Mean gain of the clients, and that of the worst decile in small print."""
    found: dict[str, dict[str, Value]] = {}
    for one in gains(rows):
        worst = f"worst decile {format.signed(one.worst_decile)}"
        found.setdefault(f"Clients' gain over {one.over}", {})[one.name] = (
            format.signed(one.mean), one.mean, worst,
        )  # fmt: skip
    return dict(found)


def _until(rows: Sequence[Row], target: float) -> dict[str, Column]:
    """Megabytes, and simulated time, to an accuracy; none for one of zero."""
    if not target:
        return {}
    found = {row.name: row.until(target) for row in rows if row.kind != "reference"}
    timed = any(row.simulated_seconds is not None for row in rows)
    shown = {"MB": (1, format.megabytes), **({"Time": (0, format.duration)} if timed else {})}
    return {
        f"{what} to {format.percent(target)}": {
            name: NEVER if at is None else EMPTY if (v := at[place]) is None else (show(v), v, "")
            for name, at in found.items()
        }
        for what, (place, show) in shown.items()
    }


def _difference(estimate: Estimate, metric: Metric) -> Value:
    bounds = format.interval(estimate, metric, difference=True)
    return format.signed(estimate.value, metric), estimate.value, bounds


def _epsilon(epsilon: float, row: Row) -> Value:
    return f"{epsilon:.2f}", epsilon, f"delta {format.significant(row.config.privacy.target_delta)}"


def _kind(row: Row) -> str:
    strategy = f" of {row.strategy}" if row.kind == "variant" else ""
    return f"{row.kind}{strategy}{', private' if row.private else ''}"


# --- one run -----------------------------------------------------------------------------------------


def _detail(row: Row, shared: dict[str, Any]) -> dict[str, Any]:
    """Details of one row beyond the table."""
    return {
        "row": row,
        "runs": [(result, configuration.differences(result.config, shared)) for result in row.results],
        "refused": [
            (result.label, record["round"], client, reason)
            for result in row.results
            for record in result.rounds
            for client, reason in (record.get("refused") or {}).items()
        ],
        "samples": _samples(row),
        "epsilons": [
            (result.label, client, f"{epsilon:.2f}")
            for result in row.results
            for client, epsilon in sorted(
                (result.result.get("epsilon_by_client") or {}).items(), key=lambda entry: int(entry[0])
            )
        ],
    }


def _samples(row: Row) -> list[tuple[str, ...]]:
    """Held-out text, what the model writes before and after training, and how the text goes on."""
    found = row.results[0].samples
    return [
        (old["prompt"], old["written"], new["written"], old["text"])
        for old, new in zip(found.get("before", []), found.get("after", []), strict=False)
    ]

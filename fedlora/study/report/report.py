"""The report of a study: one HTML file that needs nothing else, neither network nor fonts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

from fedlora.core.files import write_atomic
from fedlora.errors import ConfigError
from fedlora.study.analyse.comparisons import Comparison, compare
from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import Estimate, Row, summarise
from fedlora.study.analyse.tuning import Tuning
from fedlora.study.plan.absent import Absent
from fedlora.study.report import claims, format
from fedlora.study.report.charts import draw_charts
from fedlora.study.report.config_text import (
    differences,
    learning_rates,
    origins,
    provenances,
    setting,
    shared_config,
)
from fedlora.study.report.figure import styles_of, swatch
from fedlora.study.report.findings import find
from fedlora.study.report.notes import absence, absent_lines, how_tuned, tuned_header, tuned_lines
from fedlora.study.report.tables import write_tables


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """A cell of the sortable table: what is read, and the number it is sorted by (None sorts last)."""

    text: str
    order: float | None
    small: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of the sortable table; run and kind sort as text, the strategy is named if the run does not."""

    run: str
    strategy: str
    values: tuple[Value, ...]
    kind: str
    private: bool


def write_report(
    path: Path,
    title: str,
    results: Sequence[CellResult],
    pairs: str = "",
    *,
    absent: Sequence[Absent] = (),
    tuning: Tuning | None = None,
) -> None:
    """Write the report of these runs to ``path`` and the tables beside it; the same runs give the same bytes.

    Args:
        path: of the page.
        title: its heading.
        results: the runs.
        pairs: ``study.comparisons``.
        absent: the runs of the study that have no result.
        tuning: how their learning rates were found, if the study did that.

    Raises:
        ConfigError: there is no run to report on.
    """
    if not results:
        raise ConfigError(f"{path}: there is no finished run to report on")
    comparisons = compare(summarise(results), pairs, [missing.method for missing in absent])
    write_tables(path.parent, results, comparisons)
    write_atomic(path, render(title, results, comparisons, absent, tuning))


def render(
    title: str,
    results: Sequence[CellResult],
    comparisons: Sequence[Comparison] = (),
    absent: Sequence[Absent] = (),
    tuning: Tuning | None = None,
) -> str:
    """The report as HTML."""
    rows = summarise(results)
    shared = shared_config(rows)
    styles = styles_of(rows)
    domains = list(dict.fromkeys(d for row in rows for d in row.accuracy_by_domain))
    environment = Environment(
        loader=PackageLoader("fedlora.study.report", "page"),
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(format, name) for name in ("percent", "duration", "significant")}
    return environment.get_template("report.html").render(
        title=title,
        findings=find(rows),
        notes=[said for said in (absence(absent, len(results)), how_tuned(tuning, rows)) if said],
        absent=absent_lines(absent),
        claims=claims.sentence(comparisons),
        claims_header=claims.HEADER,
        claims_table=[claims.line(comparison) for comparison in comparisons],
        columns=_columns(rows, domains),
        table=[_line(row, domains, any(row.worst_client for row in rows)) for row in rows],
        legend=[(styles[row.name].key, swatch(styles[row.name]), row.name) for row in rows],
        charts=draw_charts(rows),
        details=[_detail(row, shared) for row in rows],
        setting=setting(rows, shared),
        learning_rates=learning_rates(rows),
        tuned_header=tuned_header(tuning),
        tuned=tuned_lines(tuning),
        origins=origins(results),
        provenances=provenances(results),
    )


# --- the table of all runs ---------------------------------------------------------------------------


def _columns(rows: Sequence[Row], domains: Sequence[str]) -> list[str]:
    written = ["Perplexity"] if rows[0].unit == "token" else []
    worst = [name for name, _ in WORST] if any(row.worst_client for row in rows) else []
    return [*written, "Accuracy", *worst, "MB up", "MB down", "Gap", "Epsilon", "Time", *domains]


def _line(row: Row, domains: Sequence[str], worst: bool) -> Line:
    """One row; the values are in the order of `_columns`, with ``worst`` those of `WORST`."""
    accuracy = row.accuracy
    shown = format.DASH if row.epsilon is None else f"{row.epsilon:.2f}"
    perplexity = [Value(text=format.significant(row.perplexity), order=row.perplexity)]
    values = (
        *(perplexity if row.unit == "token" else []),
        Value(text=format.percent(accuracy.value), order=accuracy.value, small=format.interval(accuracy)),
        *(_estimate(of(row)) for _, of in WORST if worst),
        Value(text=format.megabytes(row.bytes_up), order=row.bytes_up),
        Value(text=format.megabytes(row.bytes_down), order=row.bytes_down),
        Value(text=format.significant(row.gap), order=row.gap),
        Value(text=shown, order=row.epsilon, small=_delta(row)),
        Value(text=format.duration(row.seconds), order=row.seconds),
        *(_share(row.accuracy_by_domain.get(domain)) for domain in domains),
    )
    strategy = "" if row.strategy == row.name else row.strategy
    return Line(run=row.name, strategy=strategy, values=values, kind=row.kind, private=row.private)


def _estimate(estimate: Estimate | None) -> Value:
    if estimate is None:
        return _share(None)
    return Value(text=format.percent(estimate.value), order=estimate.value, small=format.interval(estimate))


WORST: tuple[tuple[str, Callable[[Row], Estimate | None]], ...] = (
    ("Worst client", lambda row: row.worst_client),
    ("Worst decile", lambda row: row.worst_decile),
)
"""Columns that are there where clients have test examples of their own."""


def _share(share: float | None) -> Value:
    return Value(text=format.percent(share), order=share)


def _delta(row: Row) -> str:
    return f"delta {format.significant(row.config.privacy.target_delta)}" if row.private else ""


# --- one run -----------------------------------------------------------------------------------------


def _detail(row: Row, shared: dict[str, Any]) -> dict[str, Any]:
    """What the page tells about one row beyond the table."""
    return {
        "row": row,
        "runs": [(result, differences(result.config, shared)) for result in row.results],
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

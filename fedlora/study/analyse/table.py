"""The table of a study for a paper: the mean of each method with its interval, in several forms."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from fedlora.study.analyse.intervals import Estimate, of_one, over_seeds
from fedlora.study.analyse.results import read_results
from fedlora.tasks.metrics import ACCURACY, Metric, metric_named

if TYPE_CHECKING:
    from pandas import DataFrame

LATEX = str.maketrans({"&": r"\&", "%": r"\%", "_": r"\_", "#": r"\#", "$": r"\$"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TableRow:
    """One method under one setting.

    Attributes:
        method, setting: as in the study; the setting is empty where there is one only.
        seeds: how many.
        metric: by which the study judges.
        score: the mean over the seeds with its 95 % Student t interval; of one seed the score with the
            interval of the test set (Wilson's of an accuracy, of a language model's over tokens).
        megabytes_up, megabytes_down: of all clients and rounds, the mean over seeds; None for a reference,
            which needs no federation.
        epsilon: the largest of any client and seed; None without privacy.
    """

    method: str
    setting: str
    seeds: int
    metric: Metric
    score: Estimate
    megabytes_up: float | None
    megabytes_down: float | None
    epsilon: float | None


class StudyTable:
    """The methods of a study, in the order in which they were run.

    Attributes:
        rows: one for each method and setting.
    """

    def __init__(self, rows: Sequence[TableRow]) -> None:
        self.rows = tuple(rows)

    @classmethod
    def read(cls, study: Path) -> StudyTable:
        """The table of a study's directory.

        Raises:
            ConfigError: it has no results yet.
        """
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for run in read_results(study):
            groups.setdefault((run["method"], run["setting"]), []).append(run)
        return cls([_row(*names, runs) for names, runs in groups.items()])

    def ranked(self) -> StudyTable:
        """The same, the best first."""
        return StudyTable(sorted(self.rows, key=lambda row: row.metric.cost(row.score.value)))

    def markdown(self) -> str:
        """A Markdown table, shares in percent."""
        header, cells = self.cells()
        lines = [header, ["---", *["---:"] * (len(header) - 1)], *cells]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"

    _repr_markdown_ = markdown  # what a notebook shows

    def latex(self) -> str:
        """A LaTeX ``tabular`` with booktabs' rules, shares in percent."""
        header, cells = self.cells("--")
        lines = [" & ".join(text.translate(LATEX) for text in line) + r" \\" for line in (header, *cells)]
        begin = rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}"
        rules = [begin, r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"]
        return "\n".join(rules) + "\n"

    def frame(self) -> DataFrame:
        """A pandas ``DataFrame``; the score stands under its metric's name, shares in [0, 1]."""
        from pandas import DataFrame

        return DataFrame(
            {
                "method": row.method, "setting": row.setting, "seeds": row.seeds,
                row.metric.name: row.score.value, "low": row.score.low, "high": row.score.high,
                "megabytes_up": row.megabytes_up, "megabytes_down": row.megabytes_down,
                "epsilon": row.epsilon,
            }
            for row in self.rows
        )  # fmt: skip

    def cells(self, dash: str = "-") -> tuple[list[str], list[list[str]]]:
        """The heading and the rows as text; columns that are empty in all rows are left out."""
        settings = any(row.setting for row in self.rows)
        private = any(row.epsilon is not None for row in self.rows)
        metric = self.rows[0].metric if self.rows else ACCURACY
        name = metric.name if metric is ACCURACY else metric.title
        header = ["method", *(["setting"] if settings else []), "seeds",
                  f"{name} (%)" if metric.share else name, "95 % interval",
                  "MB up", "MB down", *(["epsilon"] if private else [])]  # fmt: skip
        cells = []
        for row in self.rows:
            a, write = row.score, _percent if metric.share else _digits
            bounds = dash if a.low is None or a.high is None else f"{write(a.low)} to {write(a.high)}"
            epsilon = dash if row.epsilon is None else f"{row.epsilon:.2f}"
            cells.append([
                row.method, *([row.setting or dash] if settings else []), str(row.seeds),
                write(a.value), bounds,
                *(dash if sent is None else f"{sent:.3g}" for sent in (row.megabytes_up, row.megabytes_down)),
                *([epsilon] if private else []),
            ])  # fmt: skip
        return header, cells

    def __str__(self) -> str:
        return self.markdown()


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _digits(score: float) -> str:
    return f"{score:.4g}"


def _row(method: str, setting: str, runs: Sequence[dict[str, Any]]) -> TableRow:
    by_seed: dict[int, list[dict[str, Any]]] = {}
    for run in runs:  # of local-only each seed has a run for each client
        by_seed.setdefault(run["seed"], []).append(run)
    metric = metric_named(runs[0].get("metric") or ACCURACY.name)
    means = [fmean(run[metric.name] for run in one) for one in by_seed.values()]
    units = int(runs[0].get("tokens") or runs[0]["examples"])
    federated = runs[0]["kind"] != "reference"
    return TableRow(
        method=method,
        setting=setting,
        seeds=len(means),
        metric=metric,
        score=of_one(metric, means[0], units, runs[0].get("standard_error")) if len(means) == 1
        else over_seeds(means, *metric.bounds),
        megabytes_up=_megabytes(by_seed.values(), "bytes_up") if federated else None,
        megabytes_down=_megabytes(by_seed.values(), "bytes_down") if federated else None,
        epsilon=max((run["epsilon"] for run in runs if run["epsilon"] is not None), default=None),
    )  # fmt: skip


def _megabytes(seeds: Iterable[Sequence[dict[str, Any]]], key: str) -> float:
    return fmean(sum(run[key] or 0 for run in one) for one in seeds) / 1e6

"""Rewrites the tables of ``experiments/published/*/README.md``: ``python -m experiments.tables``.

A text says between which marks it wants which table: ``accuracy`` (a method a line, a setting a column),
``claims`` (the comparisons that the study declares), ``rates`` (the trials that tuned it), ``times`` or
``staleness`` (see `experiments.waiting`), all made of the cells that are kept there; or ``accounting``, see
`experiments.released_accounting`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from experiments.marked import markdown, marks, remade
from experiments.publish import unpack
from experiments.released_accounting import accounting_table
from experiments.waiting import staleness_table, times_table
from fedlora.config import RunConfig, read_config
from fedlora.core.files import write_atomic
from fedlora.core.sealed import unsealed_counted
from fedlora.study.analyse.comparisons import Comparison, compare
from fedlora.study.analyse.results import finished, load_results
from fedlora.study.analyse.summary import Row, summarise
from fedlora.study.analyse.tuning import Trial, Tuning, choose, reported, trials
from fedlora.study.plan.absent import applicable
from fedlora.study.plan.cells import Cell, expand
from fedlora.study.report.findings import claim, claims_header
from fedlora.tasks.metrics import ACCURACY

HERE = Path(__file__).parent
PUBLISHED = HERE / "published"
SHOWN = ("Claim", "Difference in points", "Holm p", "Alike, Holm p", "Verdict")
"""Of a decided claim, in the README."""
ALL_SHOWN = 4
"""So few seeds are shown one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What is kept of a study: its groups, its declared comparisons, how its rates were found."""

    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    tuning: Tuning | None


def planned(name: str) -> tuple[RunConfig, list[Cell], list[Trial]]:
    """A study's file, its cells before any rate is tuned, and the trials that tune."""
    config = read_config(HERE / f"{name}.toml")
    cells, _ = applicable(expand(config, num_partitions=4), config.study)
    return config, cells, trials(config.study, cells) if config.study.tune_learning_rates else []


@unsealed_counted()
def kept(name: str) -> Kept:
    """The finished cells of a study, read as ``fedlora compare`` reads them."""
    config, cells, tried = planned(name)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        unpack(PUBLISHED / name, root)
        tuning = choose(config.study, tried, root, ()) if tried else None
        cells = reported(cells, tuning.rates) if tuning else cells
        rows = summarise(load_results([cell for cell in cells if finished(root / cell.label)], root))
    methods = {cell.method for cell in cells}
    return Kept(rows=rows, comparisons=compare(rows, config.study.comparisons, methods), tuning=tuning)


def rewritten(text: str, found: Kept) -> str:
    """A text with what stands between its marks made anew."""
    tables = {"accuracy": accuracy_table, "claims": claims_table, "rates": rates_table}
    waited = {"times": times_table, "staleness": staleness_table}
    makers = {n: partial(t, found) for n, t in tables.items()} | {
        n: partial(t, found.rows) for n, t in waited.items()
    }
    return remade(text, {"accounting": accounting_table} | makers)


def accuracy_table(found: Kept) -> str:
    """Mean accuracy in percent with its 95 % interval over seeds, and how many there are."""
    by_place = {(row.method, row.setting): row for row in found.rows}
    settings = list(dict.fromkeys(row.setting for row in found.rows))
    lines = [
        [f"`{method}`", *(_accuracy(by_place.get((method, setting))) for setting in settings)]
        for method in dict.fromkeys(row.method for row in found.rows)
    ]
    return markdown(["", *settings], lines)


def claims_table(found: Kept) -> str:
    """The declared comparisons as the report has them: points of accuracy, seed by seed."""
    return markdown(claims_header(ACCURACY), map(claim, found.comparisons))


def decided_table(names: Iterable[str]) -> str:
    """What the kept cells of some studies have decided: one comparison a line."""
    decided = [
        (name, dict(zip(claims_header(ACCURACY), claim(comparison), strict=True)))
        for name in names
        for comparison in kept(name).comparisons
        if comparison.verdict != "undecided"
    ]
    return markdown(
        ["Study", *SHOWN],
        (
            [f"[{name}](../experiments/published/{name}/README.md)", *(shown[column] for column in SHOWN)]
            for name, shown in decided
        ),
    )


def rates_table(found: Kept) -> str:
    """Validation accuracy of each rate that was tried, the chosen one in bold."""
    assert found.tuning is not None
    rates = sorted({rate for tuned in found.tuning.groups for rate in tuned.tried})
    lines = []
    for tuned in found.tuning.groups:
        shown = {rate: "failed" if a is None else f"{100 * a:.1f}" for rate, a in tuned.tried.items()}
        cells = [f"**{shown[rate]}**" if rate == tuned.rate else shown.get(rate, "") for rate in rates]
        lines.append([f"`{tuned.group}`", *cells])
    return markdown(["", *(f"{rate:g}" for rate in rates)], lines)


def _accuracy(row: Row | None) -> str:
    if row is None:
        return "-"
    values, seen = list(row.score_by_seed.values()), row.score
    if len(values) <= ALL_SHOWN or seen.low is None or seen.high is None:
        return ", ".join(f"{100 * value:.1f}" for value in values)
    return f"{100 * seen.value:.1f} ({100 * seen.low:.1f} to {100 * seen.high:.1f}, n = {len(values)})"


def texts() -> list[Path]:
    """The published texts that have such tables."""
    return [page for page in sorted(PUBLISHED.glob("*/README.md")) if marks(page.read_text())]


if __name__ == "__main__":
    for page in texts():
        write_atomic(page, rewritten(page.read_text(), kept(page.parent.name)))

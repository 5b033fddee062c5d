"""``fedlora compare``: every cell of a study on one engine, then the report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape

from fedlora.checks import check
from fedlora.config import RunConfig
from fedlora.engines.cluster import check_address
from fedlora.engines.ray_pool import RayPool
from fedlora.engines.simulate import quiet, simulate_on, start
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.files import write_atomic
from fedlora.provenance import SCHEMA, check_schema
from fedlora.runs import RunDirectory
from fedlora.study.absent import FAILED, Absent, applicable, read_failure, write_failure
from fedlora.study.cells import Cell, expand
from fedlora.study.comparisons import declared
from fedlora.study.report import write_report
from fedlora.study.results import RESULT, check_directory, load_results
from fedlora.study.tuning import Trial, Tuning, check_tuning, choose, reported, trials
from fedlora.study.wording import duration

console = Console(stderr=True, soft_wrap=True, highlight=False)
STUDY = "study.json"
"""What wrote a study's directory, and the rates that it tuned."""
MOST_NAMED = 3
"""Failed runs that the last line names; more are counted."""


class Engine:
    """The actors of a study; after a failure, which leaves them in doubt, the next cell has new ones."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._pool: RayPool | None = None

    @property
    def pool(self) -> RayPool:
        """Actors that no failed run has left behind."""
        if self._pool is None:
            self._pool = start(self._config)
        return self._pool

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the actors; the next cell starts others."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def run_study(config: RunConfig, path: Path, *, resume: bool = False, retry_failed: bool = False) -> Path:
    """Run what is not finished yet, one cell after the other on one engine; the report's path.

    A cell that fails is recorded, and the next one runs; it is tried again with ``retry_failed``.

    Raises:
        ConfigError: a mistake in the study, cells that were run with other settings, or a directory that is
            in use or of another schema; nothing was run or written.
        RunFailed: cells failed; the report is on the others.
    """
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ConfigError(f"--out {path}: is not empty (use --resume to go on, or another directory)")
    check_schema(path / STUDY)
    quiet()
    with contextlib.suppress(NotApplicable):  # the file's own strategy need not be one that is compared
        check(config)
    check_address(config.engine.address)
    began = time.monotonic()
    with Engine(config) as engine:
        cells, absent = _planned(engine, config)
        tried = _trials(config, cells)
        _check_directories([trial.cell for trial in tried] or cells, path)
        _begin(config, path, absent)
        tuning = tune(engine, config, tried, path, retry_failed=retry_failed) if tried else None
        cells, failed = with_rates(cells, tuning) if tuning else (cells, [])
        _check_directories(cells, path)
        failed += run_cells(engine, cells, path, retry_failed=retry_failed)
    labels = {missing.label for missing in failed}
    results = load_results([cell for cell in cells if cell.label not in labels], path)
    if not results:
        raise _failure(failed, 0, "there is nothing to report on")
    report, title = path / "report.html", config.study.title or path.name
    write_report(report, title, results, config.study.comparisons, absent=[*absent, *failed], tuning=tuning)
    peak = max(run.result.get("peak_memory_bytes", 0) for run in results) / 2**30
    console.print(f"{len(results)} runs, {time.monotonic() - began:.0f} s, peak memory {peak:.2f} GiB")
    if failed:
        raise _failure(failed, len(results), f"the others are in {report}")
    return report


def tune(
    engine: Engine, config: RunConfig, tried: Sequence[Trial], path: Path, *, retry_failed: bool
) -> Tuning:
    """Run the trials that are not finished, and keep the rates in ``study.json``."""
    failed = run_cells(engine, [trial.cell for trial in tried], path, retry_failed=retry_failed)
    tuning = choose(config.study, tried, path, {missing.label for missing in failed})
    _write_record(config, path, tuning)
    for tuned in tuning.groups:
        edge = ", at the edge of what was tried" if tuned.at_the_edge else ""
        rate = "failed with every rate" if tuned.rate is None else f"{tuned.rate:g}{edge}"
        console.print(f"{tuned.group}: learning rate {rate}")
    return tuning


def with_rates(cells: Sequence[Cell], tuning: Tuning) -> tuple[list[Cell], list[Absent]]:
    """The cells with the rates that were found, and those of groups without one."""
    none = {tuned.group for tuned in tuning.groups if tuned.rate is None}
    reason = "its learning rate could not be tuned, a trial failed with every one"
    untuned = [Absent.of(cell, "failed", reason) for cell in cells if cell.group in none]
    return reported([cell for cell in cells if cell.group not in none], tuning.rates), untuned


def run_cells(engine: Engine, cells: Sequence[Cell], path: Path, *, retry_failed: bool) -> list[Absent]:
    """Run the cells that are neither finished nor recorded as failed; those without a result."""
    waiting = [cell for cell in cells if not (path / cell.label / RESULT).exists()]
    failed: list[Absent] = []
    took: list[float] = []
    for number, cell in enumerate(cells, start=1):
        home = path / cell.label
        if cell not in waiting:
            continue
        reason = None if retry_failed else read_failure(home)
        if reason is not None:
            console.print(f"{cell.label}: failed before ({escape(reason)})")
        else:
            left = f", about {duration(fmean(took) * len(waiting))} left" if took else ""
            began = time.monotonic()
            reason = run_cell(engine, cell, home, f"[{number}/{len(cells)}] {cell.label}{left}")
            took.append(time.monotonic() - began)
        waiting.remove(cell)
        if reason is not None:
            failed.append(Absent.of(cell, "failed", reason))
    return failed


def run_cell(engine: Engine, cell: Cell, home: Path, title: str) -> str | None:
    """Run one cell, or go on with it; why it failed, or None."""
    (home / FAILED).unlink(missing_ok=True)
    try:
        simulate_on(engine.pool, cell.config, RunDirectory(home, resume=True), title)
    except Exception as error:
        engine.close()
        reason = write_failure(home, error)
        console.print(f"[red]{cell.label} failed:[/red] {escape(reason)}")
        return reason
    return None


def _planned(engine: Engine, config: RunConfig) -> tuple[list[Cell], list[Absent]]:
    """The runs that can exist, and those that cannot."""
    cells = expand(config, engine.pool.lender(config).worker.data.num_partitions)
    declared(config.study.comparisons, {c.method: None for c in cells if c.kind != "reference"})
    return applicable(cells)


def _trials(config: RunConfig, cells: Sequence[Cell]) -> list[Trial]:
    """The runs that tune; none where rates are given."""
    if not config.study.tune_learning_rates:
        return []
    check_tuning(config, cells)
    return trials(config.study, cells)


def _check_directories(cells: Sequence[Cell], path: Path) -> None:
    for cell in cells:
        check_directory(cell, path / cell.label)


def _begin(config: RunConfig, path: Path, absent: Sequence[Absent]) -> None:
    """All is checked: make the directory, and say what will not run."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / STUDY).exists():
        _write_record(config, path)
    for missing in absent:
        console.print(f"{missing.label}: not applicable ({escape(missing.reason)})")


def _write_record(config: RunConfig, path: Path, tuning: Tuning | None = None) -> None:
    record: dict[str, Any] = {"schema": SCHEMA, "title": config.study.title}
    if tuning is not None:
        record["tuning"] = tuning.record()
    write_atomic(path / STUDY, json.dumps(record, indent=2) + "\n")


def _failure(failed: Sequence[Absent], finished: int, rest: str) -> RunFailed:
    """The last line of a study with failures."""
    named = "; ".join(f"{missing.label}: {missing.reason}" for missing in failed[:MOST_NAMED])
    more = f"; and {len(failed) - MOST_NAMED} more" if len(failed) > MOST_NAMED else ""
    return RunFailed(
        f"{len(failed)} of {finished + len(failed)} runs failed ({named}{more}); {rest}; try them again "
        "with --resume --retry-failed"
    )

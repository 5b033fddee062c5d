"""``fedlora compare``: the cells of a study, those that are not finished anywhere, then the report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedlora.config import RunConfig
from fedlora.core.code import need_extra
from fedlora.core.files import held, write_atomic
from fedlora.core.sealed import read_sealed, sealed, unsealed_counted
from fedlora.data.named_files import check_files
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.server.provenance import SCHEMA, check_schema
from fedlora.server.validate import check
from fedlora.simulation.ray_cluster import check_address
from fedlora.simulation.simulate import quiet
from fedlora.study.analyse.comparisons import declared, undecidable
from fedlora.study.analyse.results import check_directory, finished, load_results
from fedlora.study.analyse.tuning import Trial, Tuning, check_tuning, choose, reported, trials
from fedlora.study.execute.cell import Engine, console, say
from fedlora.study.execute.parallel import check_parallel
from fedlora.study.execute.reuse import STUDY, check_shared, others_beside
from fedlora.study.execute.scheduler import RunOptions, run_cells
from fedlora.study.plan.absent import FAILED, Absent, applicable
from fedlora.study.plan.cells import Cell, expand
from fedlora.study.plan.judged import judged_by

MOST_NAMED = 3
"""Failed runs that the last line names; more are counted."""


@unsealed_counted()
def run_study(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    retry_failed: bool = False,
    share: Sequence[Path] = (),
    parallel: int = 1,
) -> Path:
    """Run what is not finished yet, ``parallel`` cells at a time; the report's path.

    A cell that a study beside this one, or one of ``share``, has finished with the same configuration and
    code is taken from there. A cell that fails is recorded, and the next one runs; ``retry_failed`` tries it
    again.

    Raises:
        ConfigError: a mistake in the study, cells that were run with other settings, a directory that is in
            use or of another schema, one of ``share`` that is no study, or fewer actors than cells
            at a time; nothing was run or written.
        RunFailed: cells failed; the report is on the others.
    """
    shared = check_request(config, path, share, resume=resume)
    manner = RunOptions(shared=shared, retry_failed=retry_failed, parallel=parallel)
    quiet()
    began = time.monotonic()
    with held(path), Engine(config) as engine:
        cells, absent = planned(engine, config)
        if parallel > 1:
            check_parallel(parallel, engine.pool.size)
        tried = trials_of(config, cells)
        check_directories([trial.cell for trial in tried] or cells, path)
        _begin(config, path, absent)
        tuning = tune(engine, config, tried, path, manner) if tried else None
        cells, failed = with_rates(cells, tuning) if tuning else (cells, [])
        check_directories(cells, path)
        failed += run_cells(engine, cells, path, manner)
    labels = {missing.label for missing in failed}
    results = load_results([cell for cell in cells if cell.label not in labels], path)
    if not results:
        raise _failure(failed, 0, "there is nothing to report on")
    report, title = path / "report.html", config.study.title or path.name
    from fedlora.study.report.report import write_report

    looks, seeds = _looks(path), len({run.seed for run in results})
    _write_record(config, path, tuning, [*looks, seeds])
    write_report(
        report, title, results, config.study.comparisons, absent=[*absent, *failed], tuning=tuning,
        looks=[look for look in looks if look < seeds],
        target=config.study.target_accuracy,
        metric=judged_by(config.study, cells).name,
    )  # fmt: skip
    peak = max(run.result.get("peak_memory_bytes", 0) for run in results) / 2**30
    console.print(f"{len(results)} runs, {time.monotonic() - began:.0f} s, peak memory {peak:.2f} GiB")
    if failed:
        raise _failure(failed, len(results), f"the others are in {report}")
    return report


def check_request(config: RunConfig, path: Path, share: Sequence[Path], *, resume: bool) -> list[Path]:
    """Refuse what is wrong without a look at model or data; the studies to take finished cells from.

    Raises:
        ConfigError: as `run_study`.
    """
    need_extra("report", "fedlora compare")
    if path.is_dir() and any(path.iterdir()) and not resume:
        raise ConfigError(f"--out {path}: is not empty (use --resume to go on, or another directory)")
    check_schema(path / STUDY)
    check_shared(share)
    with contextlib.suppress(NotApplicable):  # the file's own strategy need not be one that is compared
        check(config)
    check_address(config.engine.address)
    return [*others_beside(path, say), *share]


def tune(engine: Engine, config: RunConfig, tried: Sequence[Trial], path: Path, manner: RunOptions) -> Tuning:
    """Run the trials that are not finished, and keep the rates in ``study.json``."""
    failed = run_cells(engine, [trial.cell for trial in tried], path, manner)
    tuning = choose(config.study, tried, path, {missing.label for missing in failed})
    _write_record(config, path, tuning, _looks(path))
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


def planned(engine: Engine, config: RunConfig) -> tuple[list[Cell], list[Absent]]:
    """The runs that can exist, and those that cannot.

    Raises:
        ConfigError: a mistake in the study.
    """
    cells = expand(config, engine.pool.runtime(config).data.num_partitions)
    pairs = declared(config.study.comparisons, {c.method: None for c in cells if c.kind != "reference"})
    judged_by(config.study, cells)
    possible, absent = applicable(cells, config.study)
    there = {(cell.method, cell.setting) for cell in possible}
    family = sum((mine, s) in there for mine, theirs in pairs for method, s in there if method == theirs)
    if reason := undecidable(len({cell.seed for cell in possible}), family):
        say(f"study.comparisons: {reason}")
    return possible, absent


def trials_of(config: RunConfig, cells: Sequence[Cell]) -> list[Trial]:
    """The runs that tune; none where rates are given.

    Raises:
        ConfigError: tuning that cannot be.
    """
    if not config.study.tune_learning_rates:
        return []
    check_tuning(config, cells)
    return trials(config.study, cells)


def check_directories(cells: Sequence[Cell], path: Path) -> None:
    """Refuse directories of cells that were begun with other settings, and cells to run without their files.

    Raises:
        ConfigError: there is one.
    """
    for cell in cells:
        home = path / cell.label
        check_directory(cell, home)
        if not finished(home) and not (home / FAILED).exists():
            try:
                check_files(cell.config.data)
            except ConfigError as error:
                raise ConfigError(f"{cell.label}: {error}") from None


def _begin(config: RunConfig, path: Path, absent: Sequence[Absent]) -> None:
    """All is checked: make the directory, and say what will not run."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / STUDY).exists():
        _write_record(config, path)
    for missing in absent:
        console.print(f"{missing.label}: not applicable ({missing.reason})")


def _looks(path: Path) -> list[int]:
    """With how many seeds the study was reported on."""
    looks: list[int] = read_sealed(path / STUDY, older=True).get("looks", [])
    return looks


def _write_record(
    config: RunConfig, path: Path, tuning: Tuning | None = None, looks: Sequence[int] = ()
) -> None:
    record: dict[str, Any] = {"schema": SCHEMA, "title": config.study.title, "looks": sorted(set(looks))}
    if tuning is not None:
        record["tuning"] = tuning.record()
    write_atomic(path / STUDY, json.dumps(sealed(record), indent=2) + "\n")


def _failure(failed: Sequence[Absent], finished: int, rest: str) -> RunFailed:
    """The last line of a study with failures."""
    named = "; ".join(f"{missing.label}: {missing.reason}" for missing in failed[:MOST_NAMED])
    more = f"; and {len(failed) - MOST_NAMED} more" if len(failed) > MOST_NAMED else ""
    return RunFailed(
        f"{len(failed)} of {finished + len(failed)} runs failed ({named}{more}); {rest}; try them again "
        "with --resume --retry-failed"
    )

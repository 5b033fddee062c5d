"""The cells of a study, each in its turn: taken from where it is finished, run, or recorded as failed."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from fedlora.server.identity import config_digest
from fedlora.study.analyse.results import finished
from fedlora.study.execute.cell import Engine, run_cell, say
from fedlora.study.execute.parallel import processes, run_beside
from fedlora.study.execute.reuse import ResultCache, by_other_code, check_inputs, take
from fedlora.study.plan.absent import Absent, read_failure
from fedlora.study.plan.cells import Cell
from fedlora.study.report.format import duration


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """Options of running cells, which change none of their results.

    Attributes:
        shared: directories of other studies, whose finished cells may be taken.
        retry_failed: cells that failed before are tried again.
        parallel: cells at a time, >= 1.
    """

    shared: Sequence[Path] = ()
    retry_failed: bool = False
    parallel: int = 1


def run_cells(engine: Engine, cells: Sequence[Cell], path: Path, manner: RunOptions) -> list[Absent]:
    """Run the cells that are neither finished, here or in what is shared, nor recorded as failed.

    Returns:
        Those without a result.

    Raises:
        ConfigError: as `check_inputs`; nothing was run.
    """
    check_inputs(engine, cells, path, retry_failed=manner.retry_failed)
    if other := by_other_code(cells, path):
        say(f"{_counted(other)} finished by other code than today's, or by code that was not recorded: kept")
    shelf = ResultCache(cells, path, manner.shared, say)
    _take_all(shelf, engine, cells, path)
    reasons = {} if manner.retry_failed else _failed_before(cells, path)
    titles = {cell.label: f"[{n}/{len(cells)}] {cell.label}" for n, cell in enumerate(cells, start=1)}
    if manner.parallel > 1:
        first = {config_digest(c.config): c for c in reversed(_waiting(cells, path, reasons))}
        reasons |= _beside(engine, list(reversed(first.values())), path, titles, manner.parallel)
    reasons |= _in_turn(engine, shelf, _waiting(cells, path, reasons), path, titles)
    return [Absent.of(cell, "failed", reasons[cell.label]) for cell in cells if cell.label in reasons]


def take_over(shelf: ResultCache, engine: Engine, cell: Cell, home: Path) -> Path | None:
    """Take a cell that was not begun from where the same one is finished; where that is, None if nowhere."""
    if home.exists():
        return None
    try:
        source = shelf.find(cell, lambda: engine.inputs(cell.config, home))
    except Exception:  # what is wrong with it, it will say when it runs
        engine.close()
        return None
    if source is not None:
        take(source, home)
    return source


def _take_all(shelf: ResultCache, engine: Engine, cells: Sequence[Cell], path: Path) -> None:
    """Take what is finished already; one line for each study that gave something."""
    taken = [take_over(shelf, engine, cell, path / cell.label) for cell in cells]
    for study, count in Counter(home.parent for home in taken if home is not None).items():
        say(f"{_counted(count)} taken from {os.path.relpath(study)}: same configuration, same code")


def _failed_before(cells: Sequence[Cell], path: Path) -> dict[str, str]:
    """Label -> reason of the cells that are recorded as failed."""
    found = {cell.label: read_failure(path / cell.label) for cell in _waiting(cells, path)}
    reasons = {label: reason for label, reason in found.items() if reason is not None}
    for label, reason in reasons.items():
        say(f"{label}: failed before ({reason})")
    return reasons


def _waiting(cells: Sequence[Cell], path: Path, failed: Collection[str] = ()) -> list[Cell]:
    return [cell for cell in cells if cell.label not in failed and not finished(path / cell.label)]


def _beside(
    engine: Engine, cells: Sequence[Cell], path: Path, titles: Mapping[str, str], parallel: int
) -> dict[str, str]:
    """Run cells, no two of them the same, several at a time; label -> reason of those that failed."""
    if len(cells) < 2:
        return {}
    places = engine.pool.size
    engine.close()  # its places are for others now
    with processes(engine.config, places, min(parallel, len(cells))) as runners:
        return run_beside(runners, cells, path, titles)


def _in_turn(
    engine: Engine, shelf: ResultCache, cells: Sequence[Cell], path: Path, titles: Mapping[str, str]
) -> dict[str, str]:
    """Run cells one after the other; label -> reason of those that failed."""
    reasons: dict[str, str] = {}
    took: list[float] = []
    for number, cell in enumerate(cells):
        home = path / cell.label
        if (twin := take_over(shelf, engine, cell, home)) is not None:
            say(f"{cell.label}: taken from {twin.name}: same configuration, same code")
            continue
        left = f", about {duration(fmean(took) * (len(cells) - number))} left" if took else ""
        began = time.monotonic()
        reason = run_cell(engine, cell, home, titles[cell.label] + left)
        took.append(time.monotonic() - began)
        if reason is not None:
            reasons[cell.label] = reason
    return reasons


def _counted(number: int) -> str:
    return "1 cell" if number == 1 else f"{number} cells"

"""The cells of a study one after the other on one engine: taken over, run, or recorded as failed."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import TracebackType

from rich.console import Console
from rich.markup import escape

from fedlora.config import RunConfig
from fedlora.engines.ray_pool import RayPool
from fedlora.engines.simulate import simulate_on, start
from fedlora.runs import RunDirectory
from fedlora.study.absent import FAILED, Absent, read_failure, write_failure
from fedlora.study.cells import Cell
from fedlora.study.results import finished
from fedlora.study.sharing import Shelf, by_other_code, take
from fedlora.study.wording import duration

console = Console(stderr=True, soft_wrap=True, highlight=False)


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

    def inputs(self, config: RunConfig, home: Path) -> str | None:
        """What a run in ``home`` would be given, see `fedlora.inputs`."""
        from fedlora.engines.cohorts import with_cohort_size
        from fedlora.inputs import inputs_digest

        worker = self.pool.lender(config).worker
        return inputs_digest(with_cohort_size(config, home, worker), worker)

    def close(self) -> None:
        """Stop the actors; the next cell starts others."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def run_cells(
    engine: Engine, cells: Sequence[Cell], path: Path, shared: Sequence[Path], *, retry_failed: bool
) -> list[Absent]:
    """Run the cells that are neither finished, here or in what is shared, nor recorded as failed.

    Returns:
        Those without a result.
    """
    if other := by_other_code(cells, path):
        say(f"{_counted(other)} finished by other code than today's, or by code that was not recorded: kept")
    shelf = Shelf(cells, path, shared, say)
    taken = [take_over(shelf, engine, cell, path / cell.label) for cell in cells]
    for study, count in Counter(home.parent for home in taken if home is not None).items():
        say(f"{_counted(count)} taken from {os.path.relpath(study)}: same configuration, same code")
    waiting = [cell for cell in cells if not finished(path / cell.label)]
    failed: list[Absent] = []
    took: list[float] = []
    for number, cell in enumerate(cells, start=1):
        home = path / cell.label
        if cell not in waiting:
            continue
        reason = None if retry_failed else read_failure(home)
        if reason is not None:
            console.print(f"{cell.label}: failed before ({escape(reason)})")
        elif (twin := take_over(shelf, engine, cell, home)) is not None:
            say(f"{cell.label}: taken from {twin.name}: same configuration, same code")
        else:
            left = f", about {duration(fmean(took) * len(waiting))} left" if took else ""
            began = time.monotonic()
            reason = run_cell(engine, cell, home, f"[{number}/{len(cells)}] {cell.label}{left}")
            took.append(time.monotonic() - began)
        waiting.remove(cell)
        if reason is not None:
            failed.append(Absent.of(cell, "failed", reason))
    return failed


def take_over(shelf: Shelf, engine: Engine, cell: Cell, home: Path) -> Path | None:
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


def _counted(number: int) -> str:
    return "1 cell" if number == 1 else f"{number} cells"


def say(line: str) -> None:
    """One line for people, as it is."""
    console.print(escape(line))

"""An engine of a study, and one cell on it: its result, or the record of why it failed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from fedlora.config import RunConfig
from fedlora.errors import FedLoraError, system_errors_in_words
from fedlora.server.directory import RunDirectory
from fedlora.simulation import ray_cluster
from fedlora.simulation.simulate import simulate_on, start
from fedlora.study.plan.absent import FAILED, write_failure
from fedlora.study.plan.cells import Cell

if TYPE_CHECKING:
    from fedlora.server.session import Engine as RunEngine

console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


class Engine:
    """The actors of a study; after a failure, which leaves them in doubt, the next cell has new ones.

    Args:
        config: the study's file.
        join: the address of a Ray that other engines of the study use, too; empty where this is the only one.
    """

    def __init__(self, config: RunConfig, *, join: str = "") -> None:
        self.config, self._join = config, join
        self._pool: RunEngine | None = None

    @property
    def alone(self) -> bool:
        """No other engine of the study runs at the same time."""
        return not self._join

    @property
    def pool(self) -> RunEngine:
        """Actors that no failed run has left behind."""
        if self._pool is None:
            if self._join:
                ray_cluster.join(self._join)
            self._pool = start(self.config)
        return self._pool

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def inputs(self, config: RunConfig, home: Path) -> str | None:
        """Inputs that a run in ``home`` would be given, see `fedlora.server.inputs`."""
        from fedlora.server.inputs import inputs_digest
        from fedlora.simulation.scheduling import with_cohort_size

        runtime = self.pool.runtime(config)
        return inputs_digest(with_cohort_size(config, home, runtime), runtime)

    def gives(self, config: RunConfig, home: Path, inputs: str) -> bool:
        """Whether a run in ``home`` would be given these inputs, be it on another kind of device.

        Also where that is not known, or its model or data cannot be had: the run itself says what is wrong.
        """
        from fedlora.server.inputs import inputs_by_device
        from fedlora.simulation.scheduling import with_cohort_size

        try:
            runtime = self.pool.runtime(config)
            given = inputs_by_device(with_cohort_size(config, home, runtime), runtime)
        except (FedLoraError, OSError):
            self.close()
            return True
        return not given or inputs in given.values()

    def close(self) -> None:
        """Stop the actors; the next cell starts others."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def run_cell(engine: Engine, cell: Cell, home: Path, title: str) -> str | None:
    """Run one cell, or go on with it; why it failed, or None."""
    (home / FAILED).unlink(missing_ok=True)
    try:
        with system_errors_in_words():
            directory = RunDirectory(home, resume=True, shared=home.parent)
            simulate_on(engine.pool, cell.config, directory, title, alone=engine.alone)
    except Exception as error:
        engine.close()
        reason = write_failure(home, error)
        console.print(Text.assemble((f"{cell.label} failed:", "red"), f" {reason}"))
        return reason
    return None


def say(line: str) -> None:
    """One line for people, as it is."""
    console.print(line)

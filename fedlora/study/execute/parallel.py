"""Several cells of a study at a time, each in a process of its own, which all share one Ray.

The Ray is the cluster at ``engine.address``, or one that is started here. Its places for actors are divided
among the processes, and each takes the next cell of the list when it has done one. Bits do not depend on it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from fedlora.config import RunConfig
from fedlora.errors import ConfigError, RunFailed
from fedlora.simulation.ray_cluster import connect
from fedlora.simulation.simulate import quiet
from fedlora.study.execute.cell import Engine, run_cell, say
from fedlora.study.plan.absent import write_failure
from fedlora.study.plan.cells import Cell

DIED = "its process died (memory may have run out); --resume --retry-failed goes on after its last round"
_context = get_context("spawn")


class Runner(Protocol):
    """Runs one cell at a time."""

    def run(self, cell: Cell, home: Path, title: str) -> str | None:
        """Reason that the cell failed, or None."""

    def close(self) -> None:
        """Stop at once, whatever it does."""


def check_parallel(parallel: int, places: int) -> None:
    """Refuse more cells at a time than there are actors.

    Raises:
        ConfigError: there are fewer.
    """
    if parallel > places:
        raise ConfigError(
            f"--parallel {parallel}: each cell needs an actor of its own, and there are {places} "
            "(engine.num-actors, or as many as the CPUs and GPUs hold)"
        )


def shares(places: int, parallel: int) -> list[int]:
    """Number of actors of each process.

    >>> shares(7, 3)
    [3, 2, 2]
    """
    return [places // parallel + (number < places % parallel) for number in range(parallel)]


def run_beside(
    runners: Sequence[Runner], cells: Sequence[Cell], path: Path, titles: Mapping[str, str]
) -> dict[str, str]:
    """Run cells, in their order, each on the next free runner; label -> reason of those that failed."""
    todo, lock = iter(cells), threading.Lock()
    reasons: dict[str, str] = {}

    def work(runner: Runner) -> None:
        while True:
            with lock:
                cell = next(todo, None)
            if cell is None:
                return
            reason = runner.run(cell, path / cell.label, titles[cell.label])
            if reason is not None:
                reasons[cell.label] = reason

    with ThreadPoolExecutor(len(runners)) as threads:
        turns = [threads.submit(work, runner) for runner in runners]
        try:
            for turn in wait(turns, return_when=FIRST_EXCEPTION).done:
                turn.result()
        except BaseException:
            with lock:
                todo = iter(())
            for runner in runners:
                runner.close()
            raise
    return reasons


@contextmanager
def processes(config: RunConfig, places: int, parallel: int) -> Iterator[list[Runner]]:
    """Processes with engines of their own; they, and a Ray that was started for them, end with the block."""
    began_ray = connect(config.engine.address)
    import ray

    address = ray.get_runtime_context().gcs_address
    runners: list[Runner] = []
    try:
        for share in shares(places, parallel):
            engine = replace(config.engine, num_actors=share, address=config.engine.address and address)
            runners.append(CellProcess(replace(config, engine=engine), address))
        yield runners
    finally:
        for runner in runners:
            runner.close()
        if began_ray:
            ray.shutdown()


class CellProcess:
    """A process that runs cells; one that dies has failed its cell, and another takes its place.

    Args:
        config: the study's file, with this process's share of the actors.
        address: of the Ray to join.
    """

    def __init__(self, config: RunConfig, address: str) -> None:
        self._arguments = config, address
        self._closed = False
        self._start()

    def run(self, cell: Cell, home: Path, title: str) -> str | None:
        """Reason that the cell failed, or None; None, too, where `close` interrupted it."""
        try:
            self._pipe.send((cell, home, title))
            reason: str | None = self._pipe.recv()
        except (EOFError, OSError):
            if self._closed:
                return None
            self._stop()
            self._start()
            reason = write_failure(home, RunFailed(DIED))
            say(f"{cell.label} failed: {reason}")
        return reason

    def close(self) -> None:
        """Stop at once; what the cell has written stays, and its actors end with it."""
        self._closed = True
        self._stop()

    def _start(self) -> None:
        self._pipe, theirs = _context.Pipe()
        self._process = _context.Process(target=serve, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def _stop(self) -> None:
        self._process.kill()  # Ray ends its actors; on SIGTERM it would print a trace as well
        self._process.join()


def serve(pipe: Connection, config: RunConfig, address: str) -> None:
    """Run what comes through the pipe, until the process that holds its other end is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is the parent's to stop its processes
    threading.Thread(target=_end_with_parent, daemon=True).start()
    quiet()
    with Engine(config, join=address) as engine:
        while True:
            cell, home, title = pipe.recv()
            pipe.send(run_cell(engine, cell, home, title))


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)

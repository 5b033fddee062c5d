"""One run in simulation: check, start the engine, run, and always leave the engine tidy."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fedlora.checks import check
from fedlora.config import RunConfig, to_flat
from fedlora.engines.memory import PeakMemory
from fedlora.engines.progress import RoundProgress
from fedlora.engines.ray_grid import RayGrid
from fedlora.engines.ray_pool import RayPool
from fedlora.federation import Federation
from fedlora.runs import RunDirectory


def simulate(config: RunConfig, path: Path, *, resume: bool = False) -> dict[str, Any]:
    """The result record of one simulated run; its files are in ``path``.

    Raises:
        ConfigError: the configuration cannot be carried out; nothing was started or written.
        RunFailed: the run stopped; what was written before is kept.
    """
    quiet()
    check(config)
    directory = RunDirectory(path, resume=resume)
    pool = RayPool(config.engine)
    try:
        return simulate_on(pool, config, directory)
    finally:
        pool.close()


def simulate_on(pool: RayPool, config: RunConfig, directory: RunDirectory, title: str = "") -> dict[str, Any]:
    """The same on actors that are already there."""
    with RoundProgress(title or config.strategy.name, config.num_server_rounds) as progress:
        stores = directory.path / "clients"
        federation = Federation(config, directory, progress.update, stores)
        progress.begin(federation.state.round)
        grid = RayGrid(pool, federation.partitions, to_flat(config), stores)
        with PeakMemory() as memory:
            result = federation.run(grid)
    result["peak_memory_bytes"] = memory.peak_bytes
    directory.write_result(result)
    return result


def quiet() -> None:
    """Flower's log lines would tear the progress bar; the run directory has all that they say."""
    logger = logging.getLogger("flwr")
    logger.setLevel(logging.ERROR)
    logger.propagate = False

"""One run in simulation: check, start the engine, run, and always leave the engine tidy.

Starting takes seconds, nearly all of it imports. So the driver imports while Ray starts, and the actors
import while it reads the model; modules that import transformers or Ray are imported where they are needed.
Nothing is read or prepared before the actors are known to fit.
"""

from __future__ import annotations

import importlib
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import RunConfig, to_flat
from fedlora.server.directory import RunDirectory, held
from fedlora.server.progress import RoundProgress
from fedlora.server.validate import check
from fedlora.simulation.memory import PeakMemory
from fedlora.simulation.ray_cluster import check_address

if TYPE_CHECKING:
    from clients.runtime import SharedArrays
    from fedlora.simulation.ray_pool import RayPool


def simulate(config: RunConfig, path: Path, *, resume: bool = False) -> dict[str, Any]:
    """The result record of one simulated run; its files are in ``path``.

    Raises:
        ConfigError: the configuration cannot be carried out, or the directory is in use; nothing was
            started or written.
        RunFailed: the run stopped; what was written before is kept.
    """
    quiet()
    check(config)
    check_address(config.engine.address)
    with held(path):
        directory = RunDirectory(path, resume=resume)
        pool = start(config)
        try:
            return simulate_on(pool, config, directory)
        finally:
            pool.close()


def start(config: RunConfig) -> RayPool:
    """Actors for a configuration, and its model and data in the object store.

    Raises:
        ConfigError: no place for the actors, then nothing was read; or a model, data or partition that
            cannot be had.
    """
    from fedlora.simulation.ray_pool import RayPool

    with ThreadPoolExecutor(1) as aside:
        aside.submit(_import_models)
        pool = RayPool(config.engine)
        try:
            pool.shared_model(config, aside.submit(_read, config).result())
        except BaseException:
            pool.close()
            raise
    return pool


def simulate_on(
    pool: RayPool, config: RunConfig, directory: RunDirectory, title: str = "", *, alone: bool = True
) -> dict[str, Any]:
    """The same on actors that are already there; ``alone`` as in `RoundProgress`."""
    from fedlora.server.federated_run import FederatedRun
    from fedlora.simulation.evaluation import SharedEvaluation
    from fedlora.simulation.ray_grid import RayGrid
    from fedlora.simulation.scheduling import predicted_work, with_cohort_size

    title = title or config.strategy.name
    with RoundProgress(title, config.num_server_rounds, alone=alone) as progress:
        shared_model = pool.shared_model(config)
        config = with_cohort_size(config, directory.path, shared_model.runtime)
        stores = directory.path / "clients"
        federation = FederatedRun(config, directory, progress.update, stores)
        federation.evaluator.evaluator = SharedEvaluation(pool, shared_model, federation.runtime.data)
        federation.verify = lambda: pool.verify(shared_model)
        grid = RayGrid(
            pool,
            federation.partitions,
            to_flat(config),
            stores,
            shared_model=shared_model,
            base=lambda: federation.state.base,
            cohort_size=config.engine.cohort_size,
            work=predicted_work(config, federation.runtime.data),
        )
        progress.begin(federation.state.round, federation.left_out)
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


def _import_models() -> None:
    importlib.import_module("clients.runtime")


def _read(config: RunConfig) -> SharedArrays:
    from clients.runtime import parts_of

    return parts_of(config, with_data=bool(config.engine.address))

"""Simulates one run: check, start the engine, run, and always leave the engine tidy.

Starting takes seconds, nearly all of it imports. So the driver imports while Ray starts, and the actors
import while it reads the model; modules that import transformers or Ray are imported where they are needed.
Nothing is read or prepared before the actors are known to fit.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import RunConfig
from fedlora.server.directory import RunDirectory, held
from fedlora.server.progress import RoundProgress, tell_wait
from fedlora.server.validate import check
from fedlora.simulation.memory import PeakMemory
from fedlora.simulation.ray_cluster import check_address

if TYPE_CHECKING:
    from clients.runtime import SharedArrays
    from fedlora.server.session import Engine


def simulate(
    config: RunConfig,
    path: Path,
    *,
    resume: bool = False,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The result record of one simulated run; its files are in ``path``.

    Args:
        config: what to do.
        path: the run directory.
        resume: go on with what is there.
        callback: called with each round's record.

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
        tell_wait("starting processes, reading model and data")
        engine = start(config)
        try:
            return simulate_on(engine, config, directory, callback=callback)
        finally:
            engine.close()


def start(config: RunConfig) -> Engine:
    """The engine of a configuration, and its model and data.

    Raises:
        ConfigError: no place for the actors, then nothing was read; or a model, data or partition that
            cannot be had.
    """
    return ENGINES[config.engine.name](config)


def simulate_on(
    engine: Engine,
    config: RunConfig,
    directory: RunDirectory,
    title: str = "",
    *,
    alone: bool = True,
    callback: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The same on an engine that is already there; ``alone`` as in `RoundProgress`."""
    from fedlora.server.callbacks import Tell
    from fedlora.server.federated_run import FederatedRun
    from fedlora.server.preview import Preview

    with RoundProgress(title or config.strategy.name, config.num_server_rounds, alone=alone) as progress:
        session = engine.session(config, directory.path)
        told = [Tell(progress.update, progress.begin), *([Tell(callback)] if callback else [])]
        run = FederatedRun(session, directory, told)
        if not title:  # a study's own page says the same of all its runs
            progress.show(
                Preview(run.config, run.runtime, run.strategy.rule, run.state, run.partitions).lines()
            )
        with PeakMemory() as memory:
            result = run.run()
    result["peak_memory_bytes"] = memory.peak_bytes
    directory.write_result(result)
    return result


def quiet() -> None:
    """Flower's log lines would tear the progress bar; the run directory has all that they say."""
    logger = logging.getLogger("flwr")
    logger.setLevel(logging.ERROR)
    logger.propagate = False


def _ray(config: RunConfig) -> Engine:
    from fedlora.simulation.ray_pool import RayPool

    with ThreadPoolExecutor(1) as aside:
        aside.submit(importlib.import_module, "clients.runtime")
        pool = RayPool(config.engine)
        try:
            pool.shared_model(config, aside.submit(_read, config).result())
        except BaseException:
            pool.close()
            raise
    return pool


def _read(config: RunConfig) -> SharedArrays:
    from clients.runtime import parts_of

    return parts_of(config, with_data=bool(config.engine.address))


def _in_process(config: RunConfig) -> Engine:
    from fedlora.simulation.in_process import InProcessEngine

    return InProcessEngine()


ENGINES: dict[str, Callable[[RunConfig], Engine]] = {"ray": _ray, "in-process": _in_process}
"""By ``engine.name``; an engine has sessions and ends with `close`, see `fedlora.server.session.Engine`."""

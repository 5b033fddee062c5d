"""Simulates one run: check, start the engine, run, and always leave the engine tidy.

Starting takes seconds, nearly all of it imports. So the driver imports while Ray starts (`begun`), and the
actors import while it reads the model; modules that import torch or Ray are imported where they are needed.
Nothing is read or prepared before the actors are known to fit.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import EngineConfig, RunConfig
from fedlora.server.progress import RoundProgress, tell_wait
from fedlora.simulation.memory import PeakMemory
from fedlora.simulation.ray_cluster import ahead, check_address

if TYPE_CHECKING:
    from fedlora.server.directory import RunDirectory
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
            written, and no client's process was started.
        RunFailed: the run stopped; what was written before is kept.
    """
    check_address(config.engine.address)
    with begun(config.engine):
        from fedlora.core.files import held
        from fedlora.server.directory import RunDirectory
        from fedlora.server.validate import check

        quiet()
        check(config)
        with held(path):
            return _simulate(config, RunDirectory(path, resume=resume), callback)


@contextmanager
def begun(engine: EngineConfig) -> Iterator[None]:
    """Inside there is what an engine's processes need, and this one has imported what a run needs."""
    tell_wait("starting processes, reading model and data")
    if engine.name != "ray":
        yield
        return
    with ahead(engine.address, "fedlora.server.federated_run"):
        yield


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


def _simulate(
    config: RunConfig, directory: RunDirectory, callback: Callable[[dict[str, Any]], None] | None
) -> dict[str, Any]:
    engine = start(config)
    try:
        return simulate_on(engine, config, directory, callback=callback)
    finally:
        engine.close()


def quiet() -> None:
    """Flower's log lines would tear the progress bar; the run directory has all that they say.

    Flower's own import turns them on, so it is here before.
    """
    importlib.import_module("flwr.common.logger")
    logger = logging.getLogger("flwr")
    logger.setLevel(logging.ERROR)
    logger.propagate = False


def _ray(config: RunConfig) -> Engine:
    from clients.runtime import parts_of
    from fedlora.simulation.ray_pool import RayPool

    pool = RayPool(config.engine)
    try:
        pool.shared_model(config, parts_of(config, with_data=bool(config.engine.address)))
    except BaseException:
        pool.close()
        raise
    return pool


def _in_process(config: RunConfig) -> Engine:
    from fedlora.simulation.in_process import InProcessEngine

    return InProcessEngine()


ENGINES: dict[str, Callable[[RunConfig], Engine]] = {"ray": _ray, "in-process": _in_process}
"""By ``engine.name``; an engine has sessions and ends with `close`, see `fedlora.server.session.Engine`."""

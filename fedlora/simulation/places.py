"""Places of actors on the machines of a cluster: each actor is on one machine, with all that it reserves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from fedlora.config import EngineConfig
from fedlora.errors import ConfigError

Resources: TypeAlias = Mapping[str, float]
"""What one machine has in all, by Ray's names: CPU, GPU."""


def resources_of(nodes: Iterable[Mapping[str, Any]]) -> list[Resources]:
    """The machines that are up among ``ray.nodes()``."""
    return [node["Resources"] for node in nodes if node["Alive"]]


def actors_of(engine: EngineConfig, machines: Sequence[Resources]) -> int:
    """Number of actors to start: ``engine.num-actors``, or where that is 0 as many as fit.

    Raises:
        ConfigError: not one fits, or fewer than ``engine.num-actors``.
    """
    fit = places(engine, machines)
    if engine.num_actors > fit:
        raise ConfigError(
            f"engine.num-actors = {engine.num_actors}: {fit} of them fit, each with engine.num-cpus = "
            f"{engine.num_cpus:g} and engine.num-gpus = {engine.num_gpus:g} ({_in_all(machines)}); a smaller "
            "engine.num-cpus lets more share a processor"
        )
    return engine.num_actors or fit


def places(engine: EngineConfig, machines: Sequence[Resources]) -> int:
    """Number of actors that fit on some machines, whoever else uses them.

    Raises:
        ConfigError: not even one.
    """
    total = 0
    for have in machines:
        fits = have.get("CPU", 0.0) / engine.num_cpus
        if engine.num_gpus:
            fits = min(fits, _shares(have.get("GPU", 0.0), engine.num_gpus))
        total += math.floor(fits + 1e-9)
    if total < 1:
        raise ConfigError(
            f"engine.num-cpus = {engine.num_cpus}, engine.num-gpus = {engine.num_gpus}: no machine has them "
            f"({_in_all(machines)})"
        )
    return total


def _in_all(machines: Sequence[Resources]) -> str:
    cpus, gpus = (sum(have.get(kind, 0.0) for have in machines) for kind in ("CPU", "GPU"))
    return f"in all {cpus:g} CPUs, {gpus:g} GPUs"


def _shares(gpus: float, share: float) -> float:
    """Actors on so many GPUs: one GPU holds whole shares only, as Ray places them."""
    return gpus * math.floor(1 / share + 1e-9) if share < 1 else gpus / share

"""One Ray and one pool of actors for all tests of a process that are not about their start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from fedlora.config import EngineConfig
from fedlora.simulation.ray_cluster import QUIET
from fedlora.simulation.ray_pool import RayPool

CPUS, GPUS = 3, 2
"""Logical ones: each actor without a model takes a GPU, and two of `pool` share a CPU."""


@pytest.fixture(scope="module")
def own_ray() -> Iterator[None]:
    """A Ray that this process has before fedlora needs one; which therefore leaves it running.

    It ends with the file: others end the Ray that they find, and a child that a test forks would, too.
    """
    with pytest.MonkeyPatch.context() as patched:
        for key, value in QUIET.items():
            patched.setenv(key, value)
        ray.shutdown()
        ray.init(num_cpus=CPUS, num_gpus=GPUS, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def pool(own_ray: None, cache: Path) -> Iterator[RayPool]:
    """Two actors with a model."""
    pool = RayPool(EngineConfig(num_actors=2, num_cpus=0.5))
    yield pool
    pool.close()
    assert ray.is_initialized()

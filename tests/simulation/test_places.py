"""How many actors fit, on made-up machines and on a cluster that is full or loses them."""

from __future__ import annotations

import pytest

from fedlora.config import EngineConfig
from fedlora.errors import ConfigError
from fedlora.simulation.places import actors_of, places, resources_of

TWO: list[dict[str, float]] = [{"CPU": 4.0}, {"CPU": 4.0}]


@pytest.mark.parametrize(
    ("engine", "have", "expected"),
    [
        ({}, [{"CPU": 64.0}], 64),
        ({"num_cpus": 0.1}, [{"CPU": 8.0}], 80),
        ({"num_cpus": 3.0}, [{"CPU": 4.0}, {"CPU": 4.0}], 2),
        ({"num_gpus": 1.0}, [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 2.0, "GPU": 4.0}], 6),
        ({"num_gpus": 0.25}, [{"CPU": 64.0, "GPU": 2.0}], 8),
        ({"num_gpus": 0.3}, [{"CPU": 64.0, "GPU": 2.0}], 6),
        ({"num_gpus": 0.6}, [{"CPU": 64.0, "GPU": 2.0}], 2),
        ({"num_gpus": 2.0}, [{"CPU": 64.0, "GPU": 3.0}, {"CPU": 64.0}], 1),
    ],
)
def test_what_machines_hold(engine: dict[str, float], have: list[dict[str, float]], expected: int) -> None:
    assert places(EngineConfig(**engine), have) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", [{"num_cpus": 5.0}, {"num_gpus": 1.0}, {"num_cpus": 64.0}])
@pytest.mark.parametrize("num_actors", [0, 1])
def test_resources_of_no_machine_are_one_line(engine: dict[str, float], num_actors: int) -> None:
    with pytest.raises(ConfigError, match=r"no machine has them \(in all 8 CPUs, 0 GPUs\)$"):
        actors_of(EngineConfig(**engine, num_actors=num_actors), TWO)  # type: ignore[arg-type]


def test_more_actors_than_fit_are_refused_and_as_many_are_taken() -> None:
    assert actors_of(EngineConfig(num_cpus=2.0), TWO) == 4
    assert actors_of(EngineConfig(num_cpus=2.0, num_actors=4), TWO) == 4
    with pytest.raises(ConfigError, match=r"^engine.num-actors = 5: 4 of them fit, .*in all 8 CPUs, 0 GPUs"):
        actors_of(EngineConfig(num_cpus=2.0, num_actors=5), TWO)


def test_machines_that_are_down_do_not_count() -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": False, "Resources": {"CPU": 8.0}}]
    assert resources_of(nodes) == [{"CPU": 2.0}]


@pytest.mark.parametrize("value", [0.0, 0.00001, -1.0, float("inf"), float("nan")])
def test_processors_that_ray_cannot_count_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match=r"^engine.num-cpus = .*: must be .*what Ray counts in"):
        EngineConfig(num_cpus=value)


@pytest.mark.parametrize("value", [0.00001, 1.5, -1.0, float("inf"), float("nan")])
def test_gpus_that_ray_cannot_count_are_refused(value: float) -> None:
    with pytest.raises(
        ConfigError, match=r"^engine.num-gpus = .*: must be .*a share from 0.0001 to 1, or whole GPUs"
    ):
        EngineConfig(num_gpus=value)

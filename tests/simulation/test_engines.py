"""Laws of every engine: a run has the same bits and figures on each; a new one is held to them, too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from fedlora.config import EngineConfig, RunConfig, from_flat
from fedlora.errors import ConfigError
from fedlora.server.callbacks import Tell
from fedlora.server.directory import RunDirectory
from fedlora.server.federated_run import FederatedRun
from fedlora.server.session import Engine
from fedlora.simulation.simulate import ENGINES, simulate_on, start
from tests.conftest import tiny_config
from tests.simulation.test_ray_engine import MIXED, adapter

OTHERS = [name for name in ENGINES if name != "ray"]
RUNS: dict[str, dict[str, Any]] = {
    "fedavg": {"strategy.name": "fedavg", "engine.cohort-size": 1},
    "flora-cohorts": {**MIXED, "engine.cohort-size": 2},
    "private": {"privacy.mode": "example", "privacy.noise-multiplier": 1.0, "engine.cohort-size": 1},
    "secure": {"secure.mode": "sums", "engine.cohort-size": 2},
    "half-evaluation": {"evaluation-precision": "bfloat16", "engine.cohort-size": 1},
    "local-head": {"model.head": "local", "engine.cohort-size": 1},
}
SAME = ("accuracy", "loss", "train_loss", "bytes_up", "bytes_down", "participants", "refused", "epsilon")


def of(engine: str, **keys: Any) -> RunConfig:
    settings = {"engine.name": engine, "engine.num-actors": 2, "engine.num-cpus": 0.5, "num-server-rounds": 2}
    return tiny_config(**settings, **keys)


@pytest.fixture(scope="module", params=["ray", *OTHERS])
def engine(request: pytest.FixtureRequest, cache: Path) -> Iterator[tuple[str, Engine]]:
    if request.param == "ray":
        yield "ray", request.getfixturevalue("pool")
        return
    started = start(of(request.param))
    yield request.param, started
    started.close()


REFERENCE: dict[str, Any] = {}
"""Run -> what the first engine made of it."""


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_the_same_on_every_engine(name: str, engine: tuple[str, Engine], tmp_path: Path) -> None:
    which, started = engine
    path = tmp_path / "run"
    simulate_on(started, of(which, **RUNS[name]), RunDirectory(path))
    records = [{key: r[key] for key in SAME} for r in RunDirectory(path, resume=True).rounds()]
    assert all(not record["refused"] for record in records)
    found = adapter(path), records
    assert found == REFERENCE.setdefault(name, found)


def test_the_names_of_engines_are_those_that_a_configuration_takes() -> None:
    assert set(get_args(get_type_hints(EngineConfig)["name"])) == set(ENGINES)


class Stop(Exception):
    pass


def test_a_stopped_run_goes_on_with_the_same_bits(engine: tuple[str, Engine], tmp_path: Path) -> None:
    which, started = engine
    config = of(which, **MIXED)
    simulate_on(started, config, RunDirectory(tmp_path / "whole"))

    def stop(record: dict[str, Any]) -> None:
        if record["round"] == 1:
            raise Stop

    path = tmp_path / "stopped"
    with pytest.raises(Stop):
        FederatedRun(started.session(config, path), RunDirectory(path), [Tell(stop)]).run()
    simulate_on(started, config, RunDirectory(path, resume=True))
    assert adapter(path) == adapter(tmp_path / "whole")


def test_the_name_of_an_engine_is_no_part_of_a_run(tmp_path: Path) -> None:
    """A run that was begun on one engine may go on on another."""
    directory = RunDirectory(tmp_path / "run")
    directory.open(of("ray", **{"engine.cohort-size": 2}))
    for other in OTHERS:
        RunDirectory(tmp_path / "run", resume=True).open(of(other, **{"engine.cohort-size": 2}))


def test_an_unknown_engine_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match=r"engine.name = 'cloud': .*ray.*in-process"):
        from_flat({"engine.name": "cloud"})

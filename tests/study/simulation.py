"""A stand-in for the engine of a study: made-up results, and failures where a test asks for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fedlora.config import RunConfig, from_flat
from fedlora.server.directory import RunDirectory
from tests.study.made_up import result

KEYS: dict[str, Any] = {"model.name": "tiny", "data.name": "synthetic", "num-server-rounds": 2}


class Simulation:
    """What ran, and how it shall end."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.titles: list[str] = []
        self.started = 0
        self.fails: dict[str, Exception] = {}
        self.configs: dict[str, RunConfig] = {}
        self.accuracy: Callable[[RunConfig], float] = lambda config: 0.8
        self.outcome: Callable[[RunConfig], dict[str, Any]] = lambda config: {}
        self.inputs: Callable[[RunConfig], str | None] = lambda config: None

    def start(self, config: RunConfig) -> Any:
        self.started += 1
        data = SimpleNamespace(num_partitions=4)
        runtime = SimpleNamespace(data=data)
        return SimpleNamespace(runtime=lambda config: runtime, close=lambda: None, size=4)

    def gives(self, config: RunConfig, home: Path, inputs: str) -> bool:
        return self.inputs(config) in (None, inputs)

    def simulate_on(
        self, pool: Any, config: RunConfig, directory: RunDirectory, title: str, *, alone: bool
    ) -> Any:
        directory.open(config, self.inputs(config))
        self.ran.append(directory.path.name)
        self.titles.append(title)
        self.configs[directory.path.name] = config
        if directory.path.name in self.fails:
            raise self.fails[directory.path.name]
        made_up = result(
            config.strategy.name,
            seed=config.seed,
            num_rounds=config.num_server_rounds,
            accuracy=self.accuracy(config),
            outcome=self.outcome(config),
        )
        for record in made_up.rounds:
            directory.append_round(record)
        directory.write_result(made_up.result)
        return made_up.result


def study(**keys: Any) -> RunConfig:
    given = {f"study.{key.replace('_', '-')}": value for key, value in keys.items()}
    return from_flat({**KEYS, **given})

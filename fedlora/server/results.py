"""Finished runs, read from their directories."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config import AnyPath, RunConfig, read_config
from fedlora.core.code import installed
from fedlora.errors import ConfigError
from fedlora.server.directory import read_rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One finished run, read from its directory.

    Attributes:
        path: the run directory.
        config: the configuration that it ran with.
        record: ``result.json``: the final model on the whole test set, and totals over the rounds.
        rounds: ``rounds.jsonl``: one record a round.
    """

    path: Path
    config: RunConfig
    record: dict[str, Any]
    rounds: list[dict[str, Any]]

    @property
    def adapter(self) -> Path:
        """The directory with the global adapter in PEFT's format."""
        return self.path / "adapter"

    def frame(self) -> Any:
        """The rounds as a pandas ``DataFrame``, a row for each, with a column for each number in a record.

        Raises:
            ConfigError: pandas is not installed.
        """
        pandas = installed("pandas", "frame()")
        scalar = (int, float, str, bool, type(None))
        return pandas.DataFrame(
            {key: value for key, value in record.items() if isinstance(value, scalar)}
            for record in self.rounds
        )


def load_run(path: AnyPath) -> RunResult:
    """A finished run.

    Raises:
        ConfigError: no finished run in this directory.
    """
    home = Path(path).expanduser()
    result = home / "result.json"
    if not result.is_file():
        raise ConfigError(f"{home}: no finished run, there is no result.json in it")
    return RunResult(
        path=home,
        config=read_config(home / "config.toml"),
        record=json.loads(result.read_text()),
        rounds=read_rounds(home),
    )

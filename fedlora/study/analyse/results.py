"""Finished runs of a study, read back from their run directories."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from fedlora.config import RunConfig, read_config, to_flat
from fedlora.core.sealed import read_sealed, unsealed_counted
from fedlora.errors import ConfigError, RunFailed
from fedlora.server.identity import NO_EFFECT
from fedlora.server.provenance import PROVENANCE, check_schema
from fedlora.server.results import RESULT, read_result, read_rounds, read_samples
from fedlora.study.plan.cells import Cell, Kind
from fedlora.tasks import task_named

RESULTS = "results.parquet"
"""Of a study that was reported on: a line for each run."""
TAKEN_FROM = "taken-from"
"""In the provenance of a cell that was taken over: STUDY/CELL, where it ran."""
FILES = ("config.toml", "rounds.jsonl", RESULT, PROVENANCE)
"""What a finished cell is known by."""
NEEDED = ("examples", "bytes_up", "bytes_down", "seconds")
"""What the report cannot do without in ``result.json``; and the task's metric, and one of `REFERENCES`."""
REFERENCES = ("majority_accuracy", "mean_rmse", "before")
"""What a score is compared with: the commonest label, the targets' mean, or the model before training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellResult:
    """One finished run.

    Attributes:
        label, kind, seed, group, method, setting: those of its `Cell`.
        config: the configuration it ran with.
        rounds: the records of ``rounds.jsonl``.
        result: ``result.json``: the final model on the whole test set, and totals over the rounds.
        provenance: ``provenance.json``.
        samples: ``samples.json``; empty where the model writes nothing.
    """

    label: str
    kind: Kind
    seed: int
    group: str
    method: str
    setting: str
    config: RunConfig
    rounds: list[dict[str, Any]]
    result: dict[str, Any]
    provenance: dict[str, Any]
    samples: dict[str, Any] = field(default_factory=dict)


def finished(home: Path) -> bool:
    """Whether the cell in a directory has its result."""
    return (home / RESULT).exists()


@unsealed_counted()
def load_results(cells: Iterable[Cell], root: Path) -> list[CellResult]:
    """The results of all cells, each from ``root / cell.label``.

    Raises:
        RunFailed: a cell is not finished, or what it left cannot be read.
        ConfigError: a cell was run with other settings than the study now asks for.
    """
    return [load_result(cell, root / cell.label) for cell in cells]


def load_result(cell: Cell, path: Path) -> CellResult:
    """The result of one cell from its run directory.

    Raises:
        RunFailed: not finished, or what it left cannot be read.
        ConfigError: it was run with other settings than ``cell.config``, or is of another schema.
    """
    check_schema(path / PROVENANCE)
    if not finished(path):
        raise RunFailed(f"{path / RESULT}: there is no such file, the run is not finished")
    result, config = read_result(path), read_config(path / "config.toml")
    for key in (task_named(config.task).metrics[0], *NEEDED):
        if result.get(key) is None:
            raise RunFailed(f"{path / RESULT}: {key} is missing, remove the directory and run again")
    if all(result.get(key) is None for key in REFERENCES):
        missing = REFERENCES[0]
        raise RunFailed(f"{path / RESULT}: {missing} is missing, remove the directory and run again")
    _check_same(cell.config, config, path)
    rounds = read_rounds(path)
    if len(rounds) != config.num_server_rounds and not result.get("stopped_early"):
        raise RunFailed(f"{path / 'rounds.jsonl'}: {len(rounds)} rounds, expected {config.num_server_rounds}")
    return CellResult(
        label=cell.label,
        kind=cell.kind,
        seed=cell.seed,
        group=cell.group,
        method=cell.method,
        setting=cell.setting,
        config=config,
        rounds=rounds,
        result=result,
        provenance=read_sealed(path / PROVENANCE, older=True),
        samples=read_samples(path),
    )


def single_result(path: Path) -> CellResult:
    """A finished run as the only one of a study.

    Raises:
        RunFailed, ConfigError: as `load_result`.
    """
    config, name = read_config(path / "config.toml"), path.resolve().name
    label: dict[str, Any] = {"label": name, "group": name, "method": name, "setting": ""}
    return load_result(Cell(**label, kind="strategy", seed=config.seed, config=config), path)


def study_results(path: Path) -> list[CellResult]:
    """The runs that a study's report is on.

    Raises:
        ConfigError: it has no results yet.
        RunFailed: what a run left cannot be read.
    """
    found = []
    for run in read_results(path):
        names = {key: run[key] for key in ("method", "setting", "kind", "seed")}
        group, home = "-".join(filter(None, (run["method"], run["setting"]))), path / run["run"]
        config = read_config(home / "config.toml")
        found.append(load_result(Cell(**names, label=run["run"], group=group, config=config), home))
    return found


def judged_by(study: Path) -> str:
    """Name of the metric by which the runs of a study that was reported on were judged; empty if it has none.

    Raises:
        ConfigError: it has no results yet.
    """
    runs = read_results(study)
    return str(runs[0].get("metric") or "") if runs else ""


def read_results(study: Path) -> list[dict[str, Any]]:
    """The lines of a study's ``results.parquet``.

    Raises:
        ConfigError: it has none yet.
    """
    table = study / RESULTS
    if not table.is_file():
        raise ConfigError(f"{study}: no results yet, there is no {RESULTS} in it")
    rows: list[dict[str, Any]] = pq.read_table(table).to_pylist()
    return rows


def check_directory(cell: Cell, path: Path) -> None:
    """Refuse a run directory that is of another schema or was begun with other settings.

    Raises:
        ConfigError: it is.
    """
    check_schema(path / PROVENANCE)
    if (path / "config.toml").exists():
        _check_same(cell.config, read_config(path / "config.toml"), path)


def _check_same(asked: RunConfig, ran: RunConfig, path: Path) -> None:
    before = to_flat(ran)
    for key, value in to_flat(asked).items():
        if before[key] != value and not key.startswith(NO_EFFECT):
            raise ConfigError(f"{key} = {value!r}: the run in {path} has {before[key]!r}; use another --out")

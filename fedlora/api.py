"""Public API: what the command line does, as functions that return values.

A script that runs a simulation needs no ``if __name__ == "__main__"``: Ray starts processes of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedlora.config import RunConfig, Scalar, from_flat, read_config, to_flat
from fedlora.errors import ConfigError

if TYPE_CHECKING:
    from fedlora.merge.aggregate import Outcome

AnyPath: TypeAlias = str | Path
Config: TypeAlias = RunConfig | AnyPath | Mapping[str, Scalar]
"""A configuration: an object, a TOML file, or a mapping of dotted keys such as ``{"lora.rank": 4}``."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """The finished runs of a study.

    Attributes:
        path: the study's directory.
        runs: by label, in the order of the labels.
    """

    path: Path
    runs: dict[str, RunResult]

    @property
    def report(self) -> Path:
        """The page that compares the runs."""
        return self.path / "report.html"


def run(
    config: Config,
    out: AnyPath,
    *,
    overrides: Mapping[str, Scalar] | None = None,
    resume: bool = False,
    federation: AnyPath | None = None,
) -> RunResult:
    """One run, in simulation or deployed.

    Args:
        config: see `Config`.
        out: the run directory; empty or absent, except with ``resume``.
        overrides: dotted keys that go over those of ``config``.
        resume: go on after the last checkpoint in ``out``.
        federation: the directory of a federation that is up; without it the run is simulated.

    Raises:
        ConfigError: a configuration that cannot be carried out, or a directory in use; nothing was started.
        RunFailed: the run stopped; what was written before is kept.
    """
    settings, path = _settings(config, overrides), Path(out).expanduser()
    if federation is None:
        from fedlora.simulation.simulate import simulate

        simulate(settings, path, resume=resume)
    else:
        from fedlora.deployment.operator.layout import open_layout
        from fedlora.deployment.operator.submit import submit
        from fedlora.server.progress import RoundProgress

        layout = open_layout(Path(federation).expanduser())
        with RoundProgress(settings.strategy.name, settings.num_server_rounds) as progress:
            submit(layout, settings, path, resume=resume, progress=progress.update)
    return load_run(path)


def compare(
    config: Config,
    out: AnyPath,
    *,
    overrides: Mapping[str, Scalar] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    share: Sequence[AnyPath] = (),
    parallel: int = 1,
) -> StudyResult:
    """Every run of a configuration's ``[study]`` table, and the report.

    Args:
        config: see `Config`.
        out: the study's directory; empty or absent, except with ``resume``.
        overrides: dotted keys that go over those of ``config``.
        resume: keep finished runs and go on.
        retry_failed: with ``resume``, try again what failed.
        share: directories of other studies; their finished runs of the same configuration are taken over.
        parallel: runs at a time; they divide the actors.

    Raises:
        ConfigError: a study that cannot be carried out; nothing was run.
        RunFailed: runs failed; the report is on the others.
    """
    from fedlora.study.execute.runner import run_study

    path = Path(out).expanduser()
    run_study(
        _settings(config, overrides),
        path,
        resume=resume,
        retry_failed=retry_failed,
        share=[Path(other).expanduser() for other in share],
        parallel=parallel,
    )
    return load_study(path)


def aggregate(
    adapters: Sequence[AnyPath],
    out: AnyPath,
    *,
    strategy: str = "fedavg",
    options: Mapping[str, Any] | None = None,
    weights: Sequence[float] | None = None,
    base: AnyPath | None = None,
    merge: bool = False,
) -> Outcome:
    """One round of a strategy over saved PEFT adapters; one adapter, or one merged model.

    Args:
        adapters: directories that PEFT's ``save_pretrained`` wrote.
        out: the directory to write.
        strategy: a rule's name, or ``module:Class``.
        options: the rule's options.
        weights: one for each adapter; None weighs them equally.
        base: the directory of their base model, to check their layers and to merge.
        merge: write the base with the update inside.

    Raises:
        ConfigError: adapters or options that do not fit; nothing was written.
        RunFailed: the result could not be written.
    """
    from fedlora.merge.aggregate import Request
    from fedlora.merge.aggregate import aggregate as carry_out

    request = Request(
        adapters=[Path(adapter).expanduser() for adapter in adapters],
        strategy=strategy,
        options=dict(options or {}),
        weights=weights,
        base=None if base is None else Path(base).expanduser(),
        merge=merge,
        out=Path(out).expanduser(),
    )
    return carry_out(request)


def evaluate(
    adapter: AnyPath, data: str, *, text_column: str = "text", label_column: str = "label"
) -> dict[str, Any]:
    """Accuracy, loss, accuracy by domain and number of examples of an adapter that fedlora wrote.

    Args:
        adapter: its directory.
        data: a built-in dataset or hub id (its test examples), or a file (all its rows).
        text_column: the column with the text.
        label_column: the column with the label.

    Raises:
        ConfigError: no adapter there, no such data, or labels that the adapter does not know.
    """
    from fedlora.evaluation.adapter import evaluate_adapter

    where = Path(adapter).expanduser()
    return evaluate_adapter(where, data, text_column=text_column, label_column=label_column)


def load_run(path: AnyPath) -> RunResult:
    """A finished run.

    Raises:
        ConfigError: no finished run in this directory.
    """
    from fedlora.server.directory import read_rounds

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


def load_study(path: AnyPath) -> StudyResult:
    """The finished runs of a study.

    Raises:
        ConfigError: no study in this directory.
    """
    home = Path(path).expanduser()
    if not (home / "study.json").is_file():
        raise ConfigError(f"{home}: no study, there is no study.json in it")
    found = sorted(result.parent for result in home.glob("*/result.json"))
    return StudyResult(path=home, runs={one.name: load_run(one) for one in found})


def _settings(config: Config, overrides: Mapping[str, Scalar] | None) -> RunConfig:
    if isinstance(config, (str, Path)):
        return read_config(Path(config).expanduser(), dict(overrides or {}))
    flat = to_flat(config) if isinstance(config, RunConfig) else dict(config)
    return from_flat({**flat, **(overrides or {})})

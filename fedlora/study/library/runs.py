"""Runs as values: `run` makes one, `load_run` reads one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from fedlora.config import AnyPath, Config, RunConfig, read_config
from fedlora.core.code import need_extra
from fedlora.errors import ConfigError
from fedlora.server.results import CONFIG, RESULT, read_result, read_rounds
from fedlora.study.library.adapters import evaluate
from fedlora.study.library.given import path_of, refused, settings_of

if TYPE_CHECKING:
    from pandas import DataFrame

RoundCallback: TypeAlias = Callable[[dict[str, Any]], None]
"""Called with each round's record, a line of ``rounds.jsonl``, once it is kept; 0 is before training."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One finished run, read from its directory.

    Attributes:
        path: the run directory.
        config: the configuration that it ran with.
        record: ``result.json``: the final model on the whole test set, and totals over the rounds.
        records: ``rounds.jsonl``: one record a round.
    """

    path: Path
    config: RunConfig
    record: dict[str, Any]
    records: list[dict[str, Any]]

    @property
    def adapter(self) -> Path:
        """The directory with the global adapter in PEFT's format."""
        return self.path / "adapter"

    @property
    def rounds(self) -> DataFrame:
        """A row for each round, with a column for each number in its record."""
        from pandas import DataFrame

        scalar = (int, float, str, bool, type(None))
        return DataFrame(
            {key: value for key, value in record.items() if isinstance(value, scalar)}
            for record in self.records
        )

    def evaluate(
        self, data: AnyPath, *, text_column: str | None = None, label_column: str | None = None
    ) -> dict[str, Any]:
        """The global adapter on other examples, as `fedlora.evaluate`; the columns are the run's own.

        Raises:
            ConfigError: no such data, or labels that the adapter does not know.
        """
        own = self.config.data
        return evaluate(
            self.adapter,
            data,
            text_column=own.text_column if text_column is None else text_column,
            label_column=own.label_column if label_column is None else label_column,
        )

    def report(self) -> Path:
        """Write the page of a study, of this run alone, into its directory; the page.

        Raises:
            ConfigError: the extra ``report`` is not installed.
            RunFailed: what the run left cannot be read.
        """
        need_extra("report", "report()")
        from fedlora.study.analyse.results import single_result
        from fedlora.study.report.report import write_page

        page = self.path / "report.html"
        write_page(page, self.path.resolve().name, [single_result(self.path)])
        return page


def run(
    config: Config | None = None,
    out: AnyPath | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    federation: AnyPath | None = None,
    callback: RoundCallback | None = None,
    **keys: Any,
) -> RunResult:
    """One run, in simulation or deployed.

    ``fedlora.run(out="runs/a", strategy="flora", lora={"rank": 4}, num_server_rounds=3)`` needs no file.

    Args:
        config: see `Config`; none is the defaults.
        out: the run directory; empty or absent, except with ``resume``. By default ``output-dir``.
        overrides: dotted keys that go over those of ``config``.
        resume: go on after the last checkpoint in ``out``.
        federation: the directory of a federation that is up; without it the run is simulated.
        callback: see `RoundCallback`; what it raises ends the run, which can be resumed.
        keys: keys by their fields, over all others, see `fedlora.config.from_keywords`.

    Raises:
        ConfigError: a configuration that cannot be carried out, or a directory in use; nothing was started.
        RunFailed: the run stopped; what was written before is kept.
    """
    settings = settings_of("fedlora.run", config, overrides, keys)
    path = place("run", out, settings)
    if callback is not None and not callable(callback):
        raise refused("fedlora.run: callback", callback, "a function of a record")
    if federation is None:
        from fedlora.simulation.simulate import simulate

        simulate(settings, path, resume=resume, callback=callback)
    else:
        from fedlora.deployment.operator.layout import open_layout
        from fedlora.deployment.operator.submit import submit
        from fedlora.server.progress import RoundProgress

        def told(record: dict[str, Any]) -> None:
            progress.update(record)
            if callback is not None:
                callback(record)

        layout = open_layout(path_of("fedlora.run: federation", federation))
        with RoundProgress(settings.strategy.name, settings.num_server_rounds) as progress:
            submit(layout, settings, path, resume=resume, progress=told)
    return load_run(path)


def place(function: str, out: AnyPath | None, config: RunConfig) -> Path:
    """Where the results go.

    Raises:
        ConfigError: nobody says.
    """
    place = config.output_dir if out is None or out == "" else out
    if place == "":
        raise ConfigError(f"fedlora.{function}: out is missing, the directory for the results")
    return path_of(f"fedlora.{function}: out", place)


def load_run(path: AnyPath) -> RunResult:
    """A finished run.

    Raises:
        ConfigError: no finished run in this directory.
    """
    home = path_of("fedlora.load_run: path", path)
    if not (home / RESULT).is_file():
        raise ConfigError(f"{home}: no finished run, there is no {RESULT} in it")
    record = read_result(home)
    return RunResult(path=home, config=read_config(home / CONFIG), record=record, records=read_rounds(home))

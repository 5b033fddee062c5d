"""Studies as values: `compare` runs one, `load_study` reads one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.config import AnyPath, Config, Scalar, as_config
from fedlora.errors import ConfigError
from fedlora.server.results import RunResult, load_run

if TYPE_CHECKING:
    from fedlora.study.analyse.table import StudyTable


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

    def table(self) -> StudyTable:
        """Means with their intervals, method by method; as Markdown, LaTeX or a DataFrame.

        Raises:
            ConfigError: the study has no results yet.
        """
        from fedlora.study.analyse.table import StudyTable

        return StudyTable.read(self.path)


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
        as_config(config, overrides),
        path,
        resume=resume,
        retry_failed=retry_failed,
        share=[Path(other).expanduser() for other in share],
        parallel=parallel,
    )
    return load_study(path)


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

"""Studies as values: `compare` runs one, `load_study` reads one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora.config import AnyPath, Config
from fedlora.core.code import need_extra
from fedlora.errors import ConfigError, unknown_name
from fedlora.study.library.given import number_of, path_of, paths_of, settings_of
from fedlora.study.library.runs import RunResult, load_run, place

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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

    def figure(self, name: str) -> Figure:
        """A chart of the report as a matplotlib ``Figure`` with a legend; a notebook shows it.

        ``study.figure("accuracy").savefig("accuracy.pdf")`` writes pdf, svg or png, by the ending.

        Args:
            name: ``accuracy`` (or what else runs are judged by), ``traffic``, ``gap``, ..., which end the
                addresses of the report's charts.

        Raises:
            ConfigError: no such chart, a study without results, or the extra ``report`` is not installed.
            RunFailed: what a run left cannot be read.
        """
        need_extra("report", "figure()")
        from fedlora.study.analyse.results import judged_by, study_results
        from fedlora.study.analyse.summary import summarise
        from fedlora.study.report.charts import draw_charts, with_legend

        rows = summarise(study_results(self.path), judged_by(self.path))
        charts = {chart.name: chart for chart in draw_charts(rows)}
        if name not in charts:
            raise unknown_name("figure", name, charts)
        return with_legend(charts[name], rows)


def compare(
    config: Config | None = None,
    out: AnyPath | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    retry_failed: bool = False,
    share: Sequence[AnyPath] = (),
    parallel: int = 1,
    **keys: Any,
) -> StudyResult:
    """Every run of a configuration's ``[study]`` table, and the report.

    Args:
        config: see `Config`; none is the defaults.
        out: the study's directory; empty or absent, except with ``resume``. By default ``output-dir``.
        overrides: dotted keys that go over those of ``config``.
        resume: keep finished runs and go on.
        retry_failed: with ``resume``, try again what failed.
        share: directories of other studies; their finished runs of the same configuration are taken over.
        parallel: runs at a time; they divide the actors.
        keys: as of `fedlora.run`.

    Raises:
        ConfigError: a study that cannot be carried out; nothing was run.
        RunFailed: runs failed; the report is on the others.
    """
    from fedlora.simulation.simulate import begun

    settings = settings_of("fedlora.compare", config, overrides, keys)
    path = place("compare", out, settings)
    others = paths_of("fedlora.compare: share", share)
    parallel = number_of("fedlora.compare: parallel", parallel, int)
    with begun(settings.engine):
        from fedlora.study.execute.runner import run_study

        run_study(
            settings,
            path,
            resume=resume,
            retry_failed=retry_failed,
            share=others,
            parallel=parallel,
        )
    return load_study(path)


def load_study(path: AnyPath) -> StudyResult:
    """The finished runs of a study.

    Raises:
        ConfigError: no study in this directory.
    """
    home = path_of("fedlora.load_study: path", path)
    if not (home / "study.json").is_file():
        raise ConfigError(f"{home}: no study, there is no study.json in it")
    found = sorted(result.parent for result in home.glob("*/result.json"))
    return StudyResult(path=home, runs={one.name: load_run(one) for one in found})

"""By what a study judges its runs, and what of a study that excludes."""

from __future__ import annotations

from collections.abc import Sequence

from fedlora.config import RunConfig, StudyConfig
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.validate import check, kept
from fedlora.study.plan.cells import Cell
from fedlora.tasks import task_named
from fedlora.tasks.metrics import ACCURACY, Metric, metric_named


def study_metric(study: StudyConfig, task: str) -> Metric:
    """The metric of ``study.metric``, by default the first of the task.

    Raises:
        ConfigError: the task has no such metric.
    """
    known = task_named(task).metrics
    name = study.metric or known[0]
    if name not in known:
        raise ConfigError(f"study.metric = {name!r}: task {task} has {', '.join(known)}")
    return metric_named(name)


def judged_by(study: StudyConfig, cells: Sequence[Cell]) -> Metric:
    """The metric of all runs of a study.

    Raises:
        ConfigError: different metrics, or a key that takes accuracies where runs are judged by another.
    """
    found = {study_metric(study, cell.config.task).name: cell for cell in cells}
    if len(found) > 1:
        names = " and ".join(f"{cell.label} by {name}" for name, cell in found.items())
        raise ConfigError(f"study: runs are judged by different metrics, {names}; make studies of their own")
    (name,) = found
    for key, value in (("target-accuracy", study.target_accuracy), ("tune-epsilon", study.tune_epsilon)):
        if value and name != ACCURACY.name:
            raise ConfigError(
                f"study.{key} = {value:g}: is of accuracies, runs are judged by {name}; must be 0"
            )
    return metric_named(name)


def check_cell(study: StudyConfig, config: RunConfig) -> None:
    """Refuse a run that cannot exist, or is not measured by the study's metric.

    Raises:
        ConfigError: a mistake in it.
        NotApplicable: its rule, task or mode of privacy excludes it, or clients measure their own models.
    """
    own, metric = kept(config, check(config)), study_metric(study, config.task)
    if own and metric is not ACCURACY:
        raise NotApplicable(
            f"study.metric = {metric.name!r}: {own} stays at clients, which tell hits and losses alone"
        )

"""One learning rate for each method under each setting: the best of some on a validation part.

A rate that is shared by all methods decides their order. So each strategy and variant is tuned by itself, on
seeds of its own and on ``data.validation-fraction`` of the training examples, held apart. What is reported
then runs with other seeds, trains on all training examples and is measured on the test set.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from fedlora.config import RunConfig, Scalar, StudyConfig, from_flat, to_flat
from fedlora.core.seeding import stream
from fedlora.errors import ConfigError
from fedlora.privacy.accountants import History
from fedlora.privacy.selection import epsilon_of_runs
from fedlora.privacy.trade_off import history_of
from fedlora.study.analyse.results import load_result
from fedlora.study.analyse.summary import Row
from fedlora.study.plan.cells import FILE_NAME, Cell
from fedlora.study.plan.judged import study_metric
from fedlora.tasks.metrics import ACCURACY, Metric

RATE = "train.learning-rate"
VALIDATION = "data.validation-fraction"
REFERENCES_TAKE = "fedavg"
"""The method whose rate the references have, as they have its overrides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run with one rate; ``target`` is the group that is tuned."""

    target: str
    rate: float
    cell: Cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """Outcome of tuning one group.

    Attributes:
        group: a method under a setting.
        rate: the best one, of equals the smallest; None if a trial of each rate failed.
        tried: rate -> mean score over the tuning seeds; None where a trial failed.
        histories: of the clients of each trial; empty where those of a trial are not known.
    """

    group: str
    rate: float | None
    tried: dict[float, float | None]
    histories: tuple[tuple[History, ...], ...] = ()

    @property
    def at_the_edge(self) -> bool:
        """The best rate is the smallest or largest of those tried, so that a better one may lie beyond."""
        return self.rate in (min(self.tried), max(self.tried))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """The rates of a study, and how they were found.

    Attributes:
        groups: one entry for each strategy and variant under each setting.
        seeds: of the trials.
        validation_fraction: the share of the training examples that they were measured on.
        epsilon: what the choice tells of an example in that share; 0: it is by exact scores.
        metric: of the scores.
    """

    groups: tuple[Tuned, ...]
    seeds: tuple[int, ...]
    validation_fraction: float
    epsilon: float = 0.0
    metric: Metric = ACCURACY

    @property
    def rates(self) -> dict[str, float]:
        """Group -> its rate, without those that have none."""
        return {tuned.group: tuned.rate for tuned in self.groups if tuned.rate is not None}

    def record(self) -> dict[str, Any]:
        """For ``study.json``."""
        return {
            "seeds": list(self.seeds),
            "validation-fraction": self.validation_fraction,
            "epsilon": self.epsilon or None,
            "learning-rates": {
                tuned.group: {
                    "chosen": tuned.rate,
                    self.metric.name: {f"{rate:g}": score for rate, score in tuned.tried.items()},
                }
                for tuned in self.groups
            },
        }


def check_tuning(config: RunConfig, cells: Sequence[Cell]) -> None:
    """Refuse what would tune on what is reported.

    Args:
        config: the study's file.
        cells: its runs.

    Raises:
        ConfigError: no seeds of its own, no validation part, or a run that has one of the two by itself.
    """
    study = config.study
    rates = study.learning_rate_list
    seeds = study.tune_seed_list
    if not seeds:
        raise ConfigError("study.tune-seeds = '': study.tune-learning-rates needs seeds of its own")
    for key, values in (("study.tune-learning-rates", rates), ("study.tune-seeds", seeds)):
        if len(set(values)) < len(values):
            raise ConfigError(f"{key}: a value is there more than once")
    both = sorted({cell.seed for cell in cells} & set(seeds))
    if both:
        raise ConfigError(
            f"study.tune-seeds = {study.tune_seeds!r}: seed {both[0]} is reported on too, tune on others"
        )
    if not config.data.validation_fraction:
        raise ConfigError(
            f"{VALIDATION} = 0.0: must be > 0 where study.tune-learning-rates is set, which would else tune "
            "on the test set"
        )
    base = to_flat(config)
    for cell in cells:
        privacy = cell.config.privacy
        if study.tune_epsilon and (privacy.client_level or privacy.unit_column):
            raise ConfigError(
                f"study.tune-epsilon = {study.tune_epsilon:g}: {cell.group} hides more than single examples, "
                "which may have any number in the validation part; must be 0"
            )
        own = to_flat(cell.config)
        for key in (RATE, VALIDATION):
            if own[key] != base[key]:
                raise ConfigError(
                    f"{key} = {own[key]}: is set for {cell.group} by itself, which study.tune-learning-rates "
                    "excludes; leave one of them out"
                )


def trials(study: StudyConfig, cells: Sequence[Cell]) -> list[Trial]:
    """The runs that find the rates, in the order of the groups, all rates of one seed before the next.

    Raises:
        ConfigError: a name that is taken or cannot name a directory.
    """
    first = {cell.group: cell for cell in reversed(cells) if cell.kind != "reference"}
    groups = [group for group in dict.fromkeys(cell.group for cell in cells) if group in first]
    rates = study.learning_rate_list
    found = [
        Trial(target=group, rate=rate, cell=_trial(first[group], rate, seed))
        for group in groups
        for seed in study.tune_seed_list
        for rate in rates
    ]
    taken = {cell.label.casefold() for cell in cells}
    for trial in found:
        label = trial.cell.label
        if label.casefold() in taken or not FILE_NAME.fullmatch(label):
            raise ConfigError(
                f"study: {label!r}, the name of a run that tunes, is too long or that of another run"
            )
    return found


def choose(study: StudyConfig, tried: Sequence[Trial], path: Path, failed: Collection[str]) -> Tuning:
    """The rates, from the trials in ``path`` but those whose label is among the failed.

    Raises:
        RunFailed: a trial cannot be read.
    """
    scores: dict[str, dict[float, list[float | None]]] = {}
    metric = study_metric(study, tried[0].cell.config.task)
    histories: dict[str, list[tuple[History, ...]]] = {}
    each = Counter(trial.target for trial in tried)
    for trial in tried:
        label, score = trial.cell.label, None
        if label not in failed:
            result = load_result(trial.cell, path / label).result
            score = shown_score(trial, metric, result, study.tune_epsilon, each[trial.target])
            histories.setdefault(trial.target, []).append(histories_in(result))
        scores.setdefault(trial.target, {}).setdefault(trial.rate, []).append(score)
    return Tuning(
        groups=tuple(
            _tuned(group, metric, found, histories.get(group, []), each[group])
            for group, found in scores.items()
        ),
        seeds=study.tune_seed_list,
        validation_fraction=tried[0].cell.config.data.validation_fraction,
        epsilon=study.tune_epsilon,
        metric=metric,
    )


def shown_score(
    trial: Trial, metric: Metric, result: Mapping[str, Any], epsilon: float, of_group: int
) -> float:
    """Score of a trial, with noise on its hits that is the same whenever the trial is read.

    Args:
        trial: the trial.
        metric: of the score; noise takes accuracies.
        result: its ``result.json``.
        epsilon: of all trials of its group together, for an example that they were measured on; 0: no noise.
        of_group: how many trials these are.

    Raises:
        ConfigError: accuracy is over tokens, of which an example has any number.
    """
    score = float(result[metric.name])
    if not epsilon:
        return score
    if "tokens" in result:
        raise ConfigError(
            f"study.tune-epsilon = {epsilon:g}: takes accuracies over examples, not over tokens"
        )
    examples = int(result["examples"])
    draws = stream(trial.cell.seed, "tuning", trial.cell.label)
    noise = int(np.subtract(*draws.geometric(-math.expm1(-epsilon / of_group), 2)))
    return min(1.0, max(0.0, (round(score * examples) + noise) / examples))


def histories_in(result: Mapping[str, Any]) -> tuple[History, ...]:
    """The different histories of a run's clients, from its ``result.json``; empty where not known."""
    found = tuple(history_of({"history": history}) for history in result.get("histories", []))
    return found if all(found) else ()


def epsilons(tuning: Tuning, row: Row) -> tuple[float, float | None] | None:
    """Epsilon of a private row without the choice of its rate, and with it; None where it was not tuned.

    The second is None where a run keeps no histories or a trial failed; see `fedlora.privacy.selection`.
    """
    found = next((tuned for tuned in tuning.groups if tuned.group == row.name), None)
    if found is None or row.epsilon is None:
        return None
    reported = [histories_in(run.result) for run in row.results]
    if not found.histories or not all(reported):
        return row.epsilon, None
    privacy = row.config.privacy
    runs = [*found.histories, tuple(history for run in reported for history in run)]
    composed, _ = epsilon_of_runs(runs, privacy.target_delta, privacy.accountant)
    return row.epsilon, max(composed, row.epsilon + tuning.epsilon)


def reported(cells: Sequence[Cell], rates: Mapping[str, float]) -> list[Cell]:
    """The cells with their rates, on all training examples; references have FedAvg's where it has one."""
    return [_with(cell, {VALIDATION: 0.0, **_rate_of(cell, rates)}) for cell in cells]


def _rate_of(cell: Cell, rates: Mapping[str, float]) -> dict[str, float]:
    group = cell.group
    if cell.kind == "reference":
        group = f"{REFERENCES_TAKE}-{cell.setting}" if cell.setting else REFERENCES_TAKE
    return {RATE: rates[group]} if group in rates else {}


def _tuned(
    group: str,
    metric: Metric,
    found: Mapping[float, Sequence[float | None]],
    histories: Sequence[tuple[History, ...]],
    trials: int,
) -> Tuned:
    tried: dict[float, float | None] = {}
    for rate in sorted(found):
        scores = [score for score in found[rate] if score is not None]
        tried[rate] = fmean(scores) if len(scores) == len(found[rate]) else None
    known = [(metric.cost(score), rate) for rate, score in tried.items() if score is not None]
    return Tuned(
        group=group,
        rate=min(known)[1] if known else None,
        tried=tried,
        histories=tuple(histories) if len(histories) == trials and all(histories) else (),
    )


def _trial(cell: Cell, rate: float, seed: int) -> Cell:
    """A cell of the group with this rate and seed; it is measured after the last round only."""
    label = f"tuning-{cell.group}-rate-{rate:g}-seed-{seed}"
    keys = {RATE: rate, "seed": seed, **cell.config.measured_once}
    return replace(_with(cell, keys), label=label, seed=seed, group=f"tuning-{cell.group}-rate-{rate:g}")


def _with(cell: Cell, keys: Mapping[str, Scalar]) -> Cell:
    return replace(cell, config=from_flat({**to_flat(cell.config), **keys}))

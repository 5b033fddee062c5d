"""The best round of a run, and when no better one is to be expected, by what its rounds' lines say.

As in transformers' ``Trainer``: the best evaluation is the first with the best value of a metric, say the
lowest loss, and patience counts evaluations that were not better than the best before them by more than a
threshold. Both follow from ``rounds.jsonl`` alone, so that a resumed run decides as one that was never
interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fedlora.config import RunConfig
from fedlora.core.state import ServerState, State
from fedlora.data.targets import REGRESSION
from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.checkpoint import read_checkpoint, write_checkpoint
from fedlora.server.records import SETS
from fedlora.tasks import task_named
from fedlora.tasks.metrics import METRICS

if TYPE_CHECKING:
    from fedlora.server.federated_run import FederatedRun

BEST = "best"
Records = Sequence[Mapping[str, Any]]


def check_metric(config: RunConfig, kept: str) -> None:
    """Refuse a metric that a run does not have.

    Raises:
        ConfigError: it is of another task.
        NotApplicable: clients measure their own models, of which only hits and losses are collected, and none
            of an earlier round is kept.
    """
    if kept and config.load_best_model_at_end:
        raise NotApplicable(
            "load-best-model-at-end = true: clients keep a part of the model, of the last round"
        )
    task = task_named(config.task)
    regression, named = task.problem_type == REGRESSION, config.data.evaluation_files
    if named and (kept or task.network == "image-classifier"):
        why = f"{kept} stays at clients" if kept else f"task {task.name} reads none"
        raise NotApplicable(f"data.evaluation-sets = {config.data.evaluation_sets!r}: {why}, must be empty")
    metric = metric_of(config)[1]
    there = ("loss", *task.metrics)
    if metric not in there:
        sets = f", each of them also after {' or '.join(f'{name}_' for name in named)}" if named else ""
        raise ConfigError(
            f"metric-for-best-model = {config.metric_for_best_model!r}: task {task.name} has "
            f"{', '.join(there)}{sets}"
        )
    if kept and (regression or metric.startswith("f1")):
        raise NotApplicable(
            f"task = {task.name!r}: {kept} stays at clients, which tell hits and losses of their "
            f"own models, no {'R2' if regression else 'F1'}"
        )


def metric_of(config: RunConfig) -> tuple[str, str]:
    """The evaluation set that ``metric-for-best-model`` names, or none, and the metric itself."""
    given, sets = config.metric_for_best_model, config.data.evaluation_files
    names = [name for name in sets if given.startswith(f"{name}_") and given not in METRICS]
    name = max(names, key=len, default="")
    return name, given.removeprefix(f"{name}_") if name else given


def best_round(config: RunConfig, records: Records) -> int:
    """The round of the best evaluation; 0 where none has a number."""
    costs = _costs(config, records)
    return min(costs, key=lambda number: (costs[number], number), default=0)


def has_ended(config: RunConfig, records: Records) -> bool:
    """Whether patience is at an end."""
    best, without = math.inf, 0
    for cost in _costs(config, records, unmeasured=math.inf).values():
        without = 0 if cost < best - config.early_stopping_threshold else without + 1
        best = min(best, cost)
    return 0 < config.early_stopping_patience <= without


def chosen(config: RunConfig, records: Records) -> dict[str, Any]:
    """Part of a result: which round it is of, and whether rounds were left out; nothing unless asked for."""
    found: dict[str, Any] = {}
    if config.load_best_model_at_end:
        found |= {"best_round": best_round(config, records), "best_on": chosen_on(config)}
    if len(records) < config.num_server_rounds:
        found["stopped_early"] = True
    return found


def _costs(config: RunConfig, records: Records, unmeasured: float | None = None) -> dict[int, float]:
    """Round -> what is to be small, where it was evaluated; NaN is left out unless a number stands for it."""
    name, metric = metric_of(config)
    cost = METRICS[metric].cost
    of = {r["round"]: r[SETS][name] if name else r for r in records if r["loss"] is not None}
    found = {number: cost(record[metric]) for number, record in of.items()}
    if unmeasured is not None:
        return {n: unmeasured if math.isnan(cost) else cost for n, cost in found.items()}
    return {n: cost for n, cost in found.items() if not math.isnan(cost)}


def chosen_on(config: RunConfig) -> str:
    """Which examples the best round is chosen on."""
    if name := metric_of(config)[0]:
        return name
    return "validation" if config.data.validation_fraction > 0 else "test"


def keep(run: FederatedRun) -> None:
    """Keep the state in ``best/`` if it is the best round's, with its patches: later ones are added up."""
    state = run.state
    if (
        run.config.load_best_model_at_end
        and state.round == best_round(run.config, run.directory.rounds()) > 0
    ):
        write_checkpoint(run.directory.path / BEST, ServerState(replace(state, memory={})))


def best_state(run: FederatedRun) -> State:
    """The state that a run ends with: that of its best round where this is kept, else the last one.

    Raises:
        ConfigError: ``best/`` is missing, damaged or of another round.
    """
    best = best_round(run.config, run.directory.rounds()) if run.config.load_best_model_at_end else 0
    if best in (0, run.state.round):
        return run.state
    folder = run.directory.path / BEST
    kept = read_checkpoint(folder)
    if kept is None or kept.state.round != best:
        raise ConfigError(f"{folder}: has not the model of round {best}, the best one; put it back")
    return kept.state

"""Summary of the runs of one group, with an interval (`fedlora.study.analyse.intervals`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fedlora.config import RunConfig
from fedlora.errors import RunFailed
from fedlora.server.results import RESULT
from fedlora.study.analyse.intervals import LEVEL, Estimate, of_one, over_seeds
from fedlora.study.analyse.results import CellResult
from fedlora.study.plan.cells import Kind
from fedlora.tasks import task_named
from fedlora.tasks.metrics import ACCURACY, Metric, metric_named

CONTROL = "head-only"
"""The strategy that every other one has to beat: it trains no adapter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All runs of one group.

    Attributes:
        name: the group.
        kind: strategy, reference or variant.
        results: its runs; several clients of ``local-only``, several seeds.
        metric: by which the runs are judged.
        score: its value on the whole test set.
        by_domain: means over the runs.
        bytes_up, bytes_down: what all clients sent and received in all rounds; None for a reference,
            which needs no federation.
        gap: aggregation gap of the last round that has one; None for a reference.
        epsilon: the largest of any client; None without privacy.
        seconds: for all runs of one seed.
    """

    name: str
    kind: Kind
    results: tuple[CellResult, ...]
    metric: Metric
    score: Estimate
    by_domain: dict[str, float]
    bytes_up: float | None
    bytes_down: float | None
    gap: float | None
    epsilon: float | None
    seconds: float

    @property
    def config(self) -> RunConfig:
        return self.results[0].config

    @property
    def method(self) -> str:
        return self.results[0].method

    @property
    def setting(self) -> str:
        return self.results[0].setting

    @property
    def strategy(self) -> str:
        return self.config.strategy.name

    @property
    def private(self) -> bool:
        return self.config.privacy.private

    @property
    def protected(self) -> bool:
        """Something is hidden: examples or clients."""
        return self.config.privacy.mode != "none"

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(result.seed for result in self.results))

    @property
    def examples(self) -> int:
        """The size of the test set."""
        return int(self.results[0].result["examples"])

    @property
    def unit(self) -> str:
        """Unit that accuracy is a share of."""
        return "token" if "tokens" in self.results[0].result else "example"

    @property
    def units(self) -> int:
        """Number of units in the test set."""
        return int(self.results[0].result.get("tokens", self.examples))

    @property
    def perplexity(self) -> float | None:
        """Of a language model, the mean over the runs."""
        found: list[Any] = [r.result.get("perplexity") for r in self.results]
        return fmean(found) if all(map(is_number, found)) else None

    @property
    def simulated_seconds(self) -> float | None:
        """Simulated time of one run, the mean over the runs; None where time was not simulated."""
        found: list[Any] = [r.rounds[-1].get("virtual_seconds") if r.rounds else None for r in self.results]
        return fmean(found) if all(map(is_number, found)) else None

    @property
    def scale(self) -> float:
        """Unit of differences, of which one hundredth is a point."""
        return self.metric.scale(self.results[0].result)

    def of_one(self, score: float, level: float = 1 - LEVEL) -> Estimate:
        """The score of one seed with its interval."""
        return of_one(self.metric, score, self.units, _error(self.metric, self.results), level)

    def until(self, accuracy: float) -> tuple[float | None, float] | None:
        """Simulated seconds and bytes until a round has it, means over the runs; None if one never does.

        The seconds are None where time was not simulated.
        """
        found = [reached(result, accuracy) for result in self.results]
        there = [f for f in found if f is not None]
        if not found or len(there) < len(found):
            return None
        seconds = [at for at, _ in there if at is not None]
        timed = len(seconds) == len(there)
        return fmean(seconds) if timed else None, fmean(sent for _, sent in there)

    @property
    def claim(self) -> dict[str, Any] | None:
        """The claim with the largest epsilon; of runs that kept none, epsilon and the target delta."""
        if self.epsilon is None:
            return None
        run = next(r for r in self.results if r.result.get("epsilon") == self.epsilon)
        bare = {"epsilon": self.epsilon, "delta": run.config.privacy.target_delta}
        return run.result.get("claim") or bare

    @property
    def reference(self) -> tuple[str, float]:
        """Baseline without any training, and its score."""
        result = self.results[0].result
        if result.get("before"):
            return "the model before training", float(result["before"][self.metric.name])
        name, key = self.metric.untrained
        return name, float(result[key])

    @property
    def accuracy_by_client(self) -> dict[str, float]:
        """Partition id -> accuracy on its own test examples, a mean over the runs; empty where not known.

        It is empty too where runs are judged by something else, which clients' examples are not measured by.
        """
        if self.metric is not ACCURACY:
            return {}
        found: dict[str, list[float]] = {}
        for run in self.results:
            for client, accuracy in (run.result.get("accuracy_by_client") or {}).items():
                found.setdefault(client, []).append(accuracy)
        return {client: fmean(found[client]) for client in sorted(found, key=int)}

    @property
    def worst_client(self) -> Estimate | None:
        """The lowest accuracy of any client, found in each run by itself."""
        return self._estimate("accuracy_worst_client")

    @property
    def worst_decile(self) -> Estimate | None:
        """The mean over the tenth of the clients with the lowest accuracy, found in each run by itself."""
        return self._estimate("accuracy_worst_decile")

    def _estimate(self, key: str) -> Estimate | None:
        """The mean over the seeds, with an interval if there are several; None where a run lacks it."""
        if self.metric is not ACCURACY or not all(is_number(r.result.get(key)) for r in self.results):
            return None
        values = list(_by_seed(self.results, key).values())
        return over_seeds(values) if len(values) > 1 else Estimate(value=values[0])

    @property
    def score_by_seed(self) -> dict[int, float]:
        return _by_seed(self.results, self.metric.name)

    @property
    def intruders(self) -> float | None:
        """Share of intruders (`fedlora.core.intruders`) among the vectors looked at; None: none were."""
        looked_at = sum(r.result.get("intruder_candidates", 0) for r in self.results)
        return sum(r.result.get("intruders", 0) for r in self.results) / looked_at if looked_at else None


def reached(result: CellResult, accuracy: float) -> tuple[float | None, float] | None:
    """Simulated seconds (None where time is real) and bytes until a round has an accuracy; None: never."""
    sent = 0
    for record in result.rounds:
        sent += record["bytes_up"] + record["bytes_down"]
        if is_number(record.get("accuracy")) and record["accuracy"] >= accuracy:
            return record.get("virtual_seconds"), float(sent)
    return None


def summarise(results: Sequence[CellResult], metric: str = "") -> list[Row]:
    """One row for each group, in the order in which the groups appear.

    Args:
        results: the runs.
        metric: by which they are judged; empty is the first of their task.

    Raises:
        RunFailed: a run was not measured by it.
    """
    judged = metric_named(metric or task_named(results[0].config.task).metrics[0]) if results else ACCURACY
    for result in results:
        needed = (judged.name, *([judged.untrained[1]] if not result.result.get("before") else []))
        if (lost := next((key for key in needed if result.result.get(key) is None), None)) is not None:
            raise RunFailed(f"{result.label}: {lost} is missing in its {RESULT}; run it again")
    return [
        _row(name, judged, tuple(r for r in results if r.group == name))
        for name in dict.fromkeys(r.group for r in results)
    ]


def _row(name: str, metric: Metric, results: tuple[CellResult, ...]) -> Row:
    kind, first = results[0].kind, results[0].result
    units = int(first.get("tokens", first["examples"]))
    federated = kind != "reference"
    by_seed = list(_by_seed(results, metric.name).values())
    alone = len(by_seed) == 1
    epsilons = [float(e) for r in results if (e := r.result.get("epsilon")) is not None]
    return Row(
        name=name,
        kind=kind,
        results=results,
        metric=metric,
        score=of_one(metric, by_seed[0], units, _error(metric, results)) if alone
        else over_seeds(by_seed, *metric.bounds),
        by_domain=_domains(metric, results),
        bytes_up=fmean(_by_seed(results, "bytes_up").values()) if federated else None,
        bytes_down=fmean(_by_seed(results, "bytes_down").values()) if federated else None,
        gap=_last_gap(results) if federated else None,
        epsilon=max(epsilons, default=None),
        seconds=sum(r.result["seconds"] for r in results) / len(by_seed),
    )  # fmt: skip


def _by_seed(results: Iterable[CellResult], key: str) -> dict[int, float]:
    """The mean of one result over the runs of each seed."""
    values: dict[int, list[float]] = {}
    for r in results:
        values.setdefault(r.seed, []).append(r.result[key])
    return {seed: fmean(found) for seed, found in values.items()}


def _error(metric: Metric, results: Sequence[CellResult]) -> float | None:
    """The standard error of a run's score over the test examples; None where it was not measured."""
    found: Mapping[str, float] = results[0].result.get("standard_errors") or {}
    return found.get(metric.name)


def _domains(metric: Metric, results: Iterable[CellResult]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for r in results:
        for domain, score in (r.result.get(f"{metric.name}_by_domain") or {}).items():
            values.setdefault(domain, []).append(score)
    return {domain: fmean(found) for domain, found in values.items()}


def _last_gap(results: Iterable[CellResult]) -> float | None:
    last: list[float] = []
    for r in results:
        last += [float(record["gap"]) for record in r.rounds if is_number(record.get("gap"))][-1:]
    return fmean(last) if last else None


def is_number(value: Any) -> bool:
    """Whether a recorded value is there and finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)

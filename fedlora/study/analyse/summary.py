"""Summary of the runs of one group, with an interval.

One seed: the interval is Wilson's, for the share of the test examples that are right; it knows nothing
of other seeds. Several seeds: mean and Student's t interval over the seeds. Both at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from scipy.stats import binomtest, t

from fedlora.config import RunConfig
from fedlora.study.analyse.results import CellResult
from fedlora.study.plan.cells import Kind

CONTROL = "head-only"
"""The strategy that every other one has to beat: it trains no adapter."""
LEVEL = 0.05
"""Of all tests; intervals hold at 1 - LEVEL."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A number with its 95 % interval; without bounds if there is nothing to estimate them from."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All runs of one group.

    Attributes:
        name: the group.
        kind: strategy, reference or variant.
        results: its runs; several clients of ``local-only``, several seeds.
        accuracy: on the whole test set, in [0, 1].
        accuracy_by_domain: means over the runs.
        bytes_up, bytes_down: what all clients sent and received in all rounds; None for a reference,
            which needs no federation.
        gap: aggregation gap of the last round that has one; None for a reference.
        epsilon: the largest of any client; None without privacy.
        seconds: for all runs of one seed.
    """

    name: str
    kind: Kind
    results: tuple[CellResult, ...]
    accuracy: Estimate
    accuracy_by_domain: dict[str, float]
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
        """Baseline without any training, and its accuracy."""
        result = self.results[0].result
        if result.get("before"):
            return "the model before training", float(result["before"]["accuracy"])
        return "the majority baseline", float(result["majority_accuracy"])

    @property
    def accuracy_by_client(self) -> dict[str, float]:
        """Partition id -> accuracy on its own test examples, a mean over the runs; empty where not known."""
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
        if not all(is_number(run.result.get(key)) for run in self.results):
            return None
        values = list(_by_seed(self.results, key).values())
        return over_seeds(values) if len(values) > 1 else Estimate(value=values[0])

    @property
    def accuracy_by_seed(self) -> dict[int, float]:
        return _by_seed(self.results, "accuracy")

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


def summarise(results: Sequence[CellResult]) -> list[Row]:
    """One row for each group, in the order in which the groups appear."""
    return [
        _row(name, tuple(r for r in results if r.group == name))
        for name in dict.fromkeys(r.group for r in results)
    ]


def _row(name: str, results: tuple[CellResult, ...]) -> Row:
    kind, first = results[0].kind, results[0].result
    units = int(first.get("tokens", first["examples"]))
    federated = kind != "reference"
    by_seed = list(_by_seed(results, "accuracy").values())
    epsilons = [float(e) for r in results if (e := r.result.get("epsilon")) is not None]
    return Row(
        name=name,
        kind=kind,
        results=results,
        accuracy=over_seeds(by_seed) if len(by_seed) > 1 else of_examples(by_seed[0], units),
        accuracy_by_domain=_domains(results),
        bytes_up=fmean(_by_seed(results, "bytes_up").values()) if federated else None,
        bytes_down=fmean(_by_seed(results, "bytes_down").values()) if federated else None,
        gap=_last_gap(results) if federated else None,
        epsilon=max(epsilons, default=None),
        seconds=sum(r.result["seconds"] for r in results) / len(by_seed),
    )


def _by_seed(results: Iterable[CellResult], key: str) -> dict[int, float]:
    """The mean of one result over the runs of each seed."""
    values: dict[int, list[float]] = {}
    for r in results:
        values.setdefault(r.seed, []).append(r.result[key])
    return {seed: fmean(found) for seed, found in values.items()}


def _domains(results: Iterable[CellResult]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for r in results:
        for domain, accuracy in (r.result.get("accuracy_by_domain") or {}).items():
            values.setdefault(domain, []).append(accuracy)
    return {domain: fmean(found) for domain, found in values.items()}


def _last_gap(results: Iterable[CellResult]) -> float | None:
    last: list[float] = []
    for r in results:
        last += [float(record["gap"]) for record in r.rounds if is_number(record.get("gap"))][-1:]
    return fmean(last) if last else None


def is_number(value: Any) -> bool:
    """Whether a recorded value is there and finite."""
    return isinstance(value, (int, float)) and math.isfinite(value)


# --- intervals ---------------------------------------------------------------------------------------


def of_examples(accuracy: float, examples: int, level: float = 1 - LEVEL) -> Estimate:
    """A share of test examples with its Wilson interval."""
    bounds = binomtest(round(accuracy * examples), examples).proportion_ci(level, method="wilson")
    return Estimate(value=accuracy, low=float(bounds.low), high=float(bounds.high))


def over_seeds(
    values: Sequence[float], *, low: float = 0.0, high: float = 1.0, level: float = 1 - LEVEL
) -> Estimate:
    """The mean with its t interval, cut to what is possible; at least two values."""
    mean, count = fmean(values), len(values)
    half = float(t.ppf((1 + level) / 2, count - 1)) * stdev(values) / math.sqrt(count)
    return Estimate(value=mean, low=max(low, mean - half), high=min(high, mean + half))

"""What the records of `experiments.benchmarks.engine` say: medians, ratios turn by turn, targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from experiments.benchmarks.engine_cells import (
    COHORT,
    LOOP,
    ONE,
    ONE_ACTOR,
    OVERHEAD,
    PRIVATE,
    REFERENCE,
    STOCK,
    WAYS,
    Regime,
)
from experiments.benchmarks.engine_probe import apart

Record = dict[str, Any]
STEADY, WHOLE, FIRST = "steady_seconds", "whole_seconds", "first_round_seconds"
MEMORY = "peak_memory_bytes"


@dataclass(frozen=True, slots=True)
class Figures:
    """The finished cells of one measurement, made under the same conditions."""

    records: Sequence[Record]

    @property
    def runs(self) -> list[Record]:
        return [record for record in self.records if "way" in record]

    @property
    def micro(self) -> Record | None:
        """What one process does with one step."""
        return next((record for record in self.records if "way" not in record), None)

    def regimes(self) -> list[Regime]:
        """The regimes that were run: the reference and its private twin, then by name."""
        found = {Regime(**record["regime"]) for record in self.runs}
        first = [regime for regime in (REFERENCE, PRIVATE) if regime in found]
        return first + sorted(found - set(first), key=lambda regime: regime.name)

    def turns(self, regime: Regime, way: str) -> list[Record]:
        """The runs of one way, turn by turn."""
        fit = [r for r in self.runs if Regime(**r["regime"]) == regime and r["way"] == way]
        return sorted(fit, key=lambda record: record["turn"])

    def ways(self, regime: Regime) -> list[str]:
        """The ways in which a regime was run."""
        return [way for way in WAYS if self.turns(regime, way)]

    def ratio(self, key: str, above: tuple[Regime, str], below: tuple[Regime, str]) -> float | None:
        """The median over the turns of ``above / below``; None where there is no pair of runs.

        Whole runs are compared with those of as many rounds.
        """
        pairs = zip(self.turns(*above), self.turns(*below), strict=False)
        ratios = [a[key] / b[key] for a, b in pairs if key != WHOLE or a["rounds"] == b["rounds"]]
        return median(ratios) if ratios else None

    def logits_apart(self, regime: Regime, way: str) -> float | None:
        """The largest difference of a logit from the loop on one thread, over the turns."""
        loop = self.turns(regime, LOOP)
        runs = [r for r in self.turns(regime, way) if loop and r["rounds"] == loop[0]["rounds"]]
        return max((apart(r["logits"], loop[0]["logits"]) for r in runs), default=None)

    def same_bits(self, regime: Regime, way: str) -> bool:
        """Whether every run ended with the adapter of the loop on one thread, bit for bit."""
        return len({r["adapter"] for w in (LOOP, way) for r in self.turns(regime, w)}) == 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something to be reached.

    Attributes:
        text: what.
        value: what was measured; None where it was not.
        bound: the least or the most that is good enough.
        least: whether the bound is the least.
    """

    text: str
    value: float | None
    bound: float
    least: bool

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        good = self.value >= self.bound if self.least else self.value <= self.bound
        return "yes" if good else "no"


def targets(figures: Figures) -> list[Target]:
    """All targets of the engine, with what was measured."""

    def at_least(text: str, bound: float, value: float | None) -> Target:
        return Target(text=text, value=value, bound=bound, least=True)

    def at_most(text: str, bound: float, value: float | None) -> Target:
        return Target(text=text, value=value, bound=bound, least=False)

    found = []
    for regime, which in ((REFERENCE, ""), (PRIVATE, ", private")):
        stock, ours = (regime, STOCK), (regime, COHORT)
        found += [
            at_least(f"stock app / cohorts, a steady round{which}", 1.8, figures.ratio(STEADY, stock, ours)),
            at_least(f"stock app / cohorts, the whole run{which}", 2.0, figures.ratio(WHOLE, stock, ours)),
            at_most(f"logits, one by one and the loop{which}", 1e-6, figures.logits_apart(regime, ONE)),
            at_most(f"logits, cohorts and the loop{which}", 1e-3, figures.logits_apart(regime, COHORT)),
        ]
    many = Regime(population=10_000)
    ours, crowd = (REFERENCE, COHORT), (many, COHORT)
    return [
        *found,
        at_least("one by one / cohorts, a steady round", 1.25, figures.ratio(STEADY, (REFERENCE, ONE), ours)),
        at_most(
            "one by one on one actor / the loop on one thread, clients of 2 s and more, a steady round",
            1.05,
            figures.ratio(STEADY, (OVERHEAD, ONE_ACTOR), (OVERHEAD, LOOP)),
        ),
        at_most("10,000 clients / 16 clients, a steady round", 1.2, figures.ratio(STEADY, crowd, ours)),
        at_most("10,000 clients / 16 clients, peak memory", 1.1, figures.ratio(MEMORY, crowd, ours)),
        at_most("seconds until the end of round 1, cohorts", 12.0, figure(figures.turns(*ours), FIRST)),
        at_least(
            "a cohort's step / the frozen model's forward and backward, tokens a second",
            0.9,
            None if figures.micro is None else figures.micro["cohort_of_frozen"],
        ),
    ]


def figure(records: Sequence[Record], key: str) -> float | None:
    """The median of a figure over the turns; None where there is no run."""
    return median(record[key] for record in records) if records else None

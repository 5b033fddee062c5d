"""Figures by which runs are judged: which way is better, what they can be, what they are without training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedlora.errors import unknown_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One figure of an evaluation.

    Attributes:
        name: its key in records.
        title: what people read.
        lower: whether less is better.
        share: whether it is one of 1, which people read in percent.
        bounds: the least and the most that it can be.
        untrained: what needs no training, and its key in ``result.json``.
        level: the same in a word.
        spread: the key there of what its differences are held against; empty for 1.
    """

    name: str
    title: str
    lower: bool = False
    share: bool = True
    bounds: tuple[float, float] = (0.0, 1.0)
    untrained: tuple[str, str] = ("", "")
    level: str = ""
    spread: str = ""

    def cost(self, value: float) -> float:
        """What is to be small: the value, or its negative where more is better."""
        return value if self.lower else -value

    @property
    def best(self) -> str:
        """The end at which the best value is."""
        return "lowest" if self.lower else "highest"

    @property
    def won(self) -> str:
        """What is said of the best run."""
        return "is the most accurate" if self is ACCURACY else f"has the {self.best} {self.title}"

    @property
    def difference_bounds(self) -> tuple[float, float]:
        """The least and the most that a difference can be."""
        low, high = self.bounds
        return low - high, high - low

    def scale(self, result: Mapping[str, Any]) -> float:
        """Unit of differences, a hundredth of which is a point: 1, or the spread of the test targets."""
        return float(result.get(self.spread) or 1.0) if self.spread else 1.0


MEAN, EVERY = "the mean of the test targets", "every label for each example"
ACCURACY = Metric(name="accuracy", title="Accuracy", level="majority",
                  untrained=("the majority baseline", "majority_accuracy"))  # fmt: skip
METRICS = {
    metric.name: metric
    for metric in (
        ACCURACY,
        Metric(name="loss", title="loss", lower=True, share=False, bounds=(0.0, math.inf)),
        Metric(
            name="rmse", title="RMSE", lower=True, share=False, bounds=(0.0, math.inf),
            untrained=(MEAN, "mean_rmse"), level="mean", spread="mean_rmse",
        ),
        Metric(
            name="mae", title="MAE", lower=True, share=False, bounds=(0.0, math.inf),
            untrained=(MEAN, "mean_mae"), level="mean", spread="mean_rmse",
        ),
        Metric(
            name="r2", title="R2", share=False, bounds=(-math.inf, 1.0), untrained=(MEAN, "mean_r2"),
            level="mean",
        ),
        Metric(name="f1_micro", title="F1 (micro)", untrained=(EVERY, "all_f1_micro"), level="all labels"),
        Metric(name="f1_macro", title="F1 (macro)", untrained=(EVERY, "all_f1_macro"), level="all labels"),
    )
}  # fmt: skip
"""All of them, by name."""


def metric_named(name: str) -> Metric:
    """The metric of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS)
    return METRICS[name]

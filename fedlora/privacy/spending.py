"""Sums of releases: what they cost together, and by which setting the next one is charged."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from fedlora.privacy.accountants import History
from fedlora.privacy.cut import Cut
from fedlora.privacy.filter import Budget, Setting, dominates, first_order, spent, stated_delta
from fedlora.privacy.types import NeighboringRelation

Place = tuple[str, int, int]
"""Run, round, partition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What is about to leave a client.

    Attributes:
        run_key, server_round, partition_id: where it belongs.
        noise_multiplier: noise standard deviation / clipping norm.
        sample_rate: probability with which an example or unit is in a batch.
        steps: optimiser steps.
        neighboring_relation: between which data sets noise and rate are the same.
        unit: the column whose values are protected; empty where examples are.
        cut: what makes these; None where a column's values are protected, or nobody says.
        determined_by: a digest of all that determines its bits; empty where they come from real entropy.
    """

    run_key: str
    server_round: int
    partition_id: int
    noise_multiplier: float
    sample_rate: float
    steps: int
    neighboring_relation: NeighboringRelation = NeighboringRelation.ZERO_OUT_ONE
    unit: str = ""
    cut: Cut | None = None
    determined_by: str = ""

    @property
    def setting(self) -> Setting:
        return self.noise_multiplier, self.sample_rate

    @property
    def place(self) -> Place:
        return self.run_key, self.server_round, self.partition_id


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationRelease:
    """An evaluation that is about to leave a client with noise.

    Attributes:
        run_key, server_round, partition_id: where it belongs.
        epsilon: what it costs, at delta 0.
        neighboring_relation: under which.
        cut: as of a `Release`.
    """

    run_key: str
    server_round: int
    partition_id: int
    epsilon: float
    neighboring_relation: NeighboringRelation
    cut: Cut | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What is on a ledger, or on it of one run.

    Attributes:
        epsilon: spent, on evaluations too.
        on_evaluations: of it, what was spent on evaluations, at delta 0.
        delta: at which, see `fedlora.privacy.filter.stated_delta`; 0 before the first release.
        neighboring_relation: under which; ``zero_out_one`` if only one release is under no more than that.
        accountant: by which.
        history: noise, rate and optimiser steps of each setting that was charged.
        releases: how many, unfinished ones included.
        unfinished: reserved ones whose training did not come to an end, or not yet.
        content_changes: how often the content was found changed.
        budget: the last release's; None before the first.
        head: hash of the last line that is sure to be on disk.
    """

    epsilon: float
    on_evaluations: float
    delta: float
    neighboring_relation: NeighboringRelation
    accountant: str
    history: History
    releases: int
    unfinished: int
    content_changes: int
    budget: Budget | None
    head: str

    @property
    def steps(self) -> int:
        """Optimiser steps of all releases."""
        return sum(steps for _, _, steps in self.history)


class Spending:
    """What some releases add up to.

    Attributes:
        steps: for each setting that was charged, in the order of their first use.
        budget: of the last release; None before the first.
        on_evaluations: what evaluations cost. Each is epsilon-DP whatever came before it: its privacy loss is
            at most its epsilon on every outcome, which adds to the epsilon of the steps, and to no delta.
    """

    def __init__(self) -> None:
        self.steps: Counter[Setting] = Counter()
        self.budget: Budget | None = None
        self.on_evaluations = 0.0
        self._order = math.nan
        self._before_change = 0.0
        self._largest_delta = 0.0
        self._relation = NeighboringRelation.ADD_OR_REMOVE_ONE

    def add(self, setting: Setting, steps: int, budget: Budget, relation: NeighboringRelation) -> None:
        """Count a release by the setting that it is charged as."""
        if not self.steps:
            self._order = first_order(*setting, budget)
        elif self.steps.keys() != {setting} and not self._before_change:
            self._before_change = self._largest_delta
        self._largest_delta = max(self._largest_delta, budget.target_delta)
        self.steps[setting] += steps
        self.budget = budget
        if relation == NeighboringRelation.ZERO_OUT_ONE:
            self._relation = relation

    def add_evaluation(self, epsilon: float, relation: NeighboringRelation) -> None:
        """Count an evaluation."""
        self.on_evaluations += epsilon
        if relation == NeighboringRelation.ZERO_OUT_ONE:
            self._relation = relation

    def with_one_more(self, setting: Setting, steps: int, budget: Budget) -> tuple[History, float, float]:
        """The history, its Renyi order and the delta stated for it, if a release is charged so."""
        history = _history(self.steps + Counter({setting: steps}))
        order = self._order if self.steps else first_order(*setting, budget)
        return history, order, stated_delta(self._changed(len(history)), budget)

    def charged_as(self, release: Release, budget: Budget) -> Setting:
        """The setting by which a release costs least: its own, or an earlier one that dominates it."""
        own = release.setting
        earlier = [setting for setting in self.steps if dominates(setting, own)]
        if own in self.steps or not earlier:
            return own

        def epsilon(setting: Setting) -> float:
            history, order, _ = self.with_one_more(setting, release.steps, budget)
            return spent(history, budget, order)[0]

        return min([*earlier, own], key=epsilon)

    def standing(self, *, releases: int, unfinished: int, content_changes: int, head: str) -> Standing:
        """The sum; epsilon is computed here."""
        epsilon, delta, accountant = 0.0, 0.0, ""
        if self.budget is not None:
            epsilon, accountant = spent(_history(self.steps), self.budget, self._order)
            epsilon = min(epsilon, self.budget.target_epsilon)  # all was found to fit, but for rounding
            delta = stated_delta(self._changed(len(self.steps)), self.budget)
        return Standing(
            epsilon=epsilon + self.on_evaluations,
            on_evaluations=self.on_evaluations,
            delta=delta,
            neighboring_relation=self._relation,
            accountant=accountant,
            history=_history(self.steps),
            releases=releases,
            unfinished=unfinished,
            content_changes=content_changes,
            budget=self.budget,
            head=head,
        )

    def _changed(self, settings: int) -> float:
        return 0.0 if settings == 1 else self._before_change or self._largest_delta


def _history(steps: Counter[Setting]) -> History:
    return tuple((noise, rate, count) for (noise, rate), count in steps.items())

"""What the attacker sees, and a score for each canary: how far the model went along its direction.

Plain SGD adds up what the private steps let out, so that the inner product with the canary's direction is
the best test of it; under another optimiser the same product is valid and only weaker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedlora import wire
from fedlora.audit.attack import Coins, Scores
from fedlora.audit.canaries import ClientCanaries, Design, flat
from fedlora.audit.separation import Expected
from fedlora.core.factors import Tensors
from fedlora.core.state import State

Vector = np.ndarray[Any, np.dtype[np.float64]]
KEPT, LONGEST = 64, 20_000
"""Updates, and numbers of each, that are compared pair by pair."""


@dataclass(slots=True)
class ServerView:
    """Every shipped update, by whom and in which round, next to what it was expected to be.

    Attributes:
        design: the canaries.
        exposure: partition -> draws of a canary to be expected in one round.
        scores: group -> partition -> the sum over its updates of ``<direction, expected - shipped>``.
        rounds: partition -> updates seen.
        pushed: partition -> the sets of tensors that its canaries pushed along.
        gains: group -> partition -> see `ClientCanaries`, of the last round.
        draws: (size, examples, partition) of every batch.
        residuals: ``expected - shipped`` of so many updates as are kept, in units of each group's step.
    """

    design: Design
    exposure: Mapping[int, float]
    scores: dict[str, dict[int, Scores]] = field(default_factory=dict)
    rounds: dict[int, int] = field(default_factory=dict)
    pushed: dict[int, set[tuple[tuple[str, tuple[str, ...]], ...]]] = field(default_factory=dict)
    gains: dict[str, dict[int, float]] = field(default_factory=dict)
    draws: list[tuple[int, int, int]] = field(default_factory=list)
    residuals: list[Vector] = field(default_factory=list)

    def see(self, canaries: ClientCanaries, shipped: Tensors, expected: Tensors) -> None:
        """One update: descent moves against the gradient, so a canary that was in lowers the product."""
        partition = canaries.partition
        self.rounds[partition] = self.rounds.get(partition, 0) + 1
        self.pushed.setdefault(partition, set()).add(tuple(canaries.names.items()))
        self.draws += [(size, canaries.examples, partition) for size in canaries.sizes]
        group, names = next(iter(canaries.names.items()))
        if len(self.residuals) < KEPT:
            apart = (flat(expected, names) - flat(shipped, names))[:LONGEST]
            self.residuals.append(apart.double().numpy())
        for group, names in canaries.names.items():
            self.gains.setdefault(group, {})[partition] = canaries.gains[group]
            moved = flat(expected, names) - flat(shipped, names)
            found = self.design.directions(group, partition, len(moved)) @ moved
            of_group = self.scores.setdefault(group, {})
            of_group[partition] = of_group.get(partition, 0.0) + found.double().numpy()

    def pooled(self, group: str) -> tuple[Scores, Coins]:
        """The scores of all clients that trained, in units of the draws to be expected, and the coins."""
        of_group = self.scores[group]
        partitions = sorted(of_group)
        scores = [of_group[p] / (self.rounds[p] * self.exposure[p]) for p in partitions]
        coins = [self.design.coins(group, p) for p in partitions]
        return np.concatenate(scores), np.concatenate(coins)


def standardised(view: ServerView, group: str, unit: float, expected: Mapping[int, Expected]) -> Scores:
    """The scores of a group in units of the claimed noise, in the order of `ServerView.pooled`.

    Args:
        view: what was shipped.
        group: of tensors.
        unit: what a canary moves the update by when it is drawn once and clipped: rate x norm / batch size.
        expected: of each partition.
    """
    of_group = view.scores[group]
    return np.concatenate([of_group[p] / (unit * expected[p].noise) for p in sorted(of_group)])


def final_scores(view: ServerView, group: str, before: State, after: State) -> Scores:
    """The same scores from nothing but the first and the last global model, in the order of `pooled`.

    The global factors must be in the coordinates that clients train in: a rule whose aggregate is a mean.
    """
    start, end = tensors_in(before), tensors_in(after)
    scores = []
    for partition in sorted(view.scores[group]):
        total = np.zeros(view.design.counts[group])
        for pushed in sorted(view.pushed[partition]):
            names = dict(pushed)[group]
            moved = flat(start, names) - flat(end, names)
            total += (view.design.directions(group, partition, len(moved)) @ moved).double().numpy()
        scores.append(total)
    return np.concatenate(scores)


def tensors_of(arrays: Tensors) -> Tensors:
    """What was shipped, factors as ``query.A``."""
    parts = wire.from_peft(arrays)
    factors = {f"{n}.{x}": t for n, own in parts.layers.items() for x, t in own.items()}
    return {**factors, **parts.head}


def tensors_in(state: State) -> Tensors:
    """The global factors and head, likewise."""
    factors = {f"{n}.{x}": t for n, f in state.adapters.items() for x, t in f.tensors().items()}
    return {**factors, **state.head}

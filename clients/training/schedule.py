"""Learning-rate schedules: a factor of every step size, from the step's place in its round or run alone.

At place x of N, after W of warm-up and with floor f,

    factor = x / W                               x < W
             f + (1 - f) shape((x - W) / (N - W))    else,    shape(p) = 1,  1 - p,  (1 + cos(pi p)) / 2

``round``: x = 0 .. N - 1 are the steps of one round, as in the schedules of transformers (whose ``linear``
within each round is what FedIT's and FLoRA's released clients train by). ``run``: the steps of all rounds in
a row; a client that is not chosen for a round misses its part. ``rounds``: x = 1 .. N are the rounds, and
within one the factor stays (FlowerTune's cosine).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from fedlora.config import TrainConfig

SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda p: 1.0,
    "linear": lambda p: 1.0 - p,
    "cosine": lambda p: (1.0 + math.cos(math.pi * p)) / 2.0,
}


@dataclass(frozen=True, slots=True)
class Stage:
    """A round among those of its run; both from 1."""

    server_round: int = 1
    num_rounds: int = 1


ONLY_ROUND = Stage()
NOTHING = ""
"""Ending of what rests where nothing does."""


def rate_factors(config: TrainConfig, steps: int, stage: Stage) -> tuple[float, ...]:
    """The factor of each step of a client's round.

    >>> rate_factors(TrainConfig(schedule="linear", warmup_steps=2), 6, ONLY_ROUND)
    (0.0, 0.5, 1.0, 0.75, 0.5, 0.25)
    """
    if config.schedule_over == "rounds":
        return (_factor(config, stage.server_round, stage.num_rounds),) * steps
    before, count = 0, steps
    if config.schedule_over == "run":
        before, count = (stage.server_round - 1) * steps, steps * stage.num_rounds
    return tuple(_factor(config, before + step, count) for step in range(steps))


def _factor(config: TrainConfig, place: int, count: int) -> float:
    if place < config.warmup_steps:
        return place / config.warmup_steps
    progress = (place - config.warmup_steps) / max(count - config.warmup_steps, 1)
    floor = config.schedule_floor
    return floor + (1.0 - floor) * SHAPES[config.schedule](progress)


def resting(config: TrainConfig, step: int) -> str:
    """End of the names of the factors that rest in a step, from 0; none unless A and B alternate.

    LA-LoRA: Liu et al., "Rethinking LoRA for Privacy-Preserving Federated Learning in Large Models", ICLR
    2026 (arXiv 2602.19926). B comes first, since B = 0 leaves A without a gradient.
    """
    return (".A", ".B")[step % 2] if config.alternating else NOTHING


def rests(name: str, ending: str) -> bool:
    """Whether a tensor is one that rests, see `resting`."""
    return ending != NOTHING and name.endswith(ending)


def at_rest(
    factors: Mapping[str, nn.Parameter], config: TrainConfig
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The factors, by name, that even and odd steps, from 0, do not move; see `resting`."""
    even, odd = ([p for name, p in factors.items() if rests(name, resting(config, s))] for s in (0, 1))
    return even, odd


class ScheduledRates:
    """The step sizes of an optimiser, set before each of its steps.

    Args:
        optimizer: any of torch's kind, with its first step sizes.
        factors: of each step, see `rate_factors`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, factors: Sequence[float]) -> None:
        self._groups = optimizer.param_groups
        self._first = [group["lr"] for group in self._groups]
        self._factors = factors
        self._step = 0

    def advance(self) -> None:
        """Set those of the next step."""
        factor = self._factors[self._step]
        for group, first in zip(self._groups, self._first, strict=True):
            group["lr"] = factor * first
        self._step += 1

"""The smaller epsilon of who sees sums alone is stated where the sum is one of Gaussians, and only there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from clients.privacy.sums import GRIDS, epsilon_of_sums
from fedlora.privacy.calibration import epsilon_of
from fedlora.secure.fixed_point import FixedPoint
from fedlora.secure.masks import signed
from tests.conftest import tiny_config

CLIENTS, NOISE, ROUNDS, RATE = 5, 2.0, 2, 0.1
STEP: dict[str, Any] = {
    "privacy.mode": "example", "privacy.noise-multiplier": NOISE, "privacy.target-epsilon": 50.0,
    "train.optimizer": "sgd", "train.local-steps": 1, "train.batch-size": 16, "train.learning-rate": 1e-3,
    "num-server-rounds": ROUNDS, "secure.mode": "sums", "secure.min-clients": 3,
}  # fmt: skip
CLAIM = {"history": [[NOISE, RATE, ROUNDS]]}


def stated(**keys: Any) -> float | None:
    return epsilon_of_sums(tiny_config(**{**STEP, **keys}), CLAIM, CLIENTS)


def test_it_is_that_of_the_noise_of_the_honest() -> None:
    both = ((NOISE * 2**0.5, RATE, ROUNDS),)  # of at least 3 clients 1 colludes
    assert stated() == epsilon_of(both, 1e-5, "rdp")


@pytest.mark.parametrize(
    "keys",
    [
        {"strategy.name": "lora-a2", "strategy.options": '{"rank": 8}'},
        {"strategy.name": "fedsa"},
        {"strategy.name": "local-only"},
        {"strategy.name": "module:Rule"},
        {"model.head": "local"},
        {"secure.bits": 16},
        {"train.learning-rate": 1e-9},
        {"train.loraplus-lr-ratio": 1e-6},
        {"train.head-learning-rate": 1e-9},
        {"train.schedule": "linear", "train.schedule-over": "rounds", "train.schedule-floor": 1e-7},
        {"train.local-steps": 2},
        {"train.optimizer": "adamw"},
        {"train.nested-ranks": True},
        {"secure.mode": "none"},
        {"secure.largest-change": 1e-6},
    ],
)
def test_nothing_is_stated_where_the_sum_is_another_one(keys: dict[str, Any]) -> None:
    assert stated(**keys) is None


def test_on_grids_that_are_fine_enough_rounded_shares_add_up_to_rounded_noise() -> None:
    """Of a number whose own share lies on the edge of a step, in the worst stream of roundings."""
    fixed = FixedPoint(CLIENTS, 32, 1.0, 1)
    step = 1.0 / fixed.steps

    class Edge(np.random.Generator):
        def random(self, size: int) -> Any:  # type: ignore[override]
            return np.full(size, 0.999)

    drawn, edge = np.random.default_rng(0), Edge(np.random.PCG64(0))
    for deviation, wide in ((GRIDS * step, False), (step / 40, True)):
        values = deviation * drawn.standard_normal((CLIENTS, 40_000))
        total = sum(signed(fixed.encode(own, 1.0, edge), 32) for own in values) * step
        total = total - total.mean()
        shows = abs(total.std() / (deviation * CLIENTS**0.5) - 1)
        assert bool(shows > 0.1) is wide

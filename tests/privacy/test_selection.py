"""What several private runs cost an example that is in all of them."""

from __future__ import annotations

import math
from itertools import product

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from fedlora.privacy.accountants import History
from fedlora.privacy.calibration import epsilon_of, epsilon_spent
from fedlora.privacy.selection import epsilon_of_runs
from tests.privacy.hockey_stick import epsilon as by_hockey_stick

DELTA = 1e-5


def gaussian_epsilon(mu: float) -> float:
    """Balle and Wang, ICML 2018, Theorem 8."""

    def excess(epsilon: float) -> float:
        near, far = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(norm.cdf(near) - math.exp(epsilon) * norm.cdf(far)) - DELTA

    return float(brentq(excess, 0, 100))


def test_trials_and_run_without_sampling_are_one_gaussian_mechanism() -> None:
    """Three trials of four rounds and a run of six, noises of their own: mu^2 = sum T / z^2."""
    trial, run = ((5.0, 1.0, 4),), ((3.0, 1.0, 6),)
    found, accountant = epsilon_of_runs([[trial, trial]] * 3 + [[run]], DELTA, "prv")
    exact = gaussian_epsilon(math.sqrt(3 * 4 / 25 + 6 / 9))
    assert accountant == "prv"
    assert exact <= found <= exact + 0.02


def test_with_sampling_it_is_an_independent_computations() -> None:
    rate, noise, steps = 0.05, 0.9, 20
    history: History = ((noise, rate, steps),)
    exact = by_hockey_stick({0: 1 - rate, 1: rate}, {0: 1.0}, noise, 4 * steps, DELTA)
    found, _ = epsilon_of_runs([[history]] * 4, DELTA, "pld")
    assert found == pytest.approx(exact, abs=2e-3)


def test_clients_that_differ_are_bounded_for_every_way_to_be_at_them() -> None:
    """An example is at some client of each run: no choice of them costs more than is said."""
    runs: list[list[History]] = [
        [((0.8, 0.02, 100),), ((1.3, 0.1, 100),)],
        [((0.7, 0.01, 100),), ((1.1, 0.06, 100),), ((2.0, 0.3, 90),)],
        [((0.9, 0.03, 100), (1.0, 0.03, 20))],
    ]
    found, accountant = epsilon_of_runs(runs, DELTA, "prv")
    assert accountant == "rdp"
    ways = [epsilon_of(sum(way, ()), DELTA, "rdp") for way in product(*runs)]
    assert max(ways) <= found <= 1.1 * max(ways)
    assert found > epsilon_of(sum((run[0] for run in runs), ()), DELTA, "pld")


def test_more_trials_cost_more_and_the_run_alone_is_what_it_was() -> None:
    history: History = ((0.8, 0.02, 200),)
    spent = [epsilon_of_runs([[history]] * count, DELTA, "prv")[0] for count in (1, 2, 4)]
    assert spent[0] == pytest.approx(epsilon_spent(*history[0], DELTA), abs=1e-9)
    assert spent == sorted(spent)
    assert spent[2] < 4 * spent[0]

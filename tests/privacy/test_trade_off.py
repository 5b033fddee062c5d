"""What an attacker can find at most: never optimistic, within the claim, tight where that is known."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import beta, norm

from fedlora.privacy.accountants import History
from fedlora.privacy.calibration import epsilon_of, epsilon_spent
from fedlora.privacy.trade_off import CLAIM_ALONE, LOSSES, claim_alone, curve_of, trade_off
from tests.privacy.hockey_stick import profile_of

RATES = (1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.9)
DELTA = 1e-5


@pytest.mark.parametrize(("noise", "steps"), [(1.0, 1), (2.0, 50), (10.0, 50), (40.0, 9)])
def test_without_sampling_it_is_the_gaussian_curve(noise: float, steps: int) -> None:
    """Dong, Roth and Su: T releases of noise z are one of mu = sqrt(T) / z, TPR = Phi(Phi^-1(FPR) + mu)."""
    curve = trade_off(((noise, 1.0, steps),), epsilon_spent(noise, 1.0, steps, DELTA), DELTA)
    assert curve.found_by == LOSSES
    for rate in RATES:
        exact = float(norm.cdf(norm.ppf(rate) + math.sqrt(steps) / noise))
        assert exact <= curve.true_positive_rate(rate) <= exact + 2e-4


@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.8, 0.05, 30), (0.6, 0.01, 200)])
def test_with_sampling_it_is_an_independent_computations(noise: float, rate: float, steps: int) -> None:
    """Both directions by densities on a grid; lines of the worse one, at epsilons of their own."""
    curve = trade_off(((noise, rate, steps),), 100.0, DELTA)
    epsilons = np.linspace(0, 12, 777)
    out, drawn = {0: 1.0}, {0: 1 - rate, 1: rate}
    deltas = np.maximum(
        profile_of(drawn, out, noise, steps, epsilons), profile_of(out, drawn, noise, steps, epsilons)
    )
    for alarm in RATES:
        lines = deltas + np.exp(epsilons) * alarm, 1 - np.exp(-epsilons) * (1 - deltas - alarm)
        assert curve.true_positive_rate(alarm) == pytest.approx(float(np.min(lines)), rel=3e-3)


def test_no_likelihood_ratio_test_finds_more() -> None:
    """The best attack there is on the worst case, played 200,000 times for each side."""
    noise, rate, steps, games = 0.7, 0.1, 20, 200_000
    draws = np.random.default_rng(0)

    def losses(member: bool) -> np.ndarray:
        total = np.zeros(games)
        for _ in range(steps):
            seen = draws.normal(0, noise, games) + (member & (draws.random(games) < rate))
            total += np.log1p(rate * np.expm1((2 * seen - 1) / (2 * noise**2)))
        return total

    members, others = losses(True), losses(False)
    curve = trade_off(((noise, rate, steps),), 100.0, DELTA)
    gaps = []
    for alarm in (0.01, 0.05, 0.2):
        found = int((members > np.quantile(others, 1 - alarm)).sum())
        low, high = beta.ppf(1e-6, found, games - found + 1), beta.isf(1e-6, found + 1, games - found)
        assert low - 1e-3 <= curve.true_positive_rate(alarm)
        gaps.append(curve.true_positive_rate(alarm) - high)
    assert max(gaps) < 0.02  # of one direction; the bound holds for both


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_it_never_allows_for_more_than_the_claim(accountant: str) -> None:
    for noise, rate, steps in ((0.8, 0.02, 300), (3.0, 1.0, 5), (1.2, 0.3, 40)):
        epsilon = epsilon_spent(noise, rate, steps, DELTA, accountant)
        curve, alone = trade_off(((noise, rate, steps),), epsilon, DELTA), claim_alone(epsilon, DELTA)
        reached = [curve.true_positive_rate(alarm) for alarm in RATES]
        assert all(r <= alone.true_positive_rate(a) for r, a in zip(reached, RATES, strict=True))
        assert all(r >= a for r, a in zip(reached, RATES, strict=True))
        assert reached == sorted(reached)


def test_where_the_setting_changed_only_the_claim_speaks() -> None:
    history: History = ((1.0, 0.05, 10), (1.1, 0.05, 10))
    epsilon = epsilon_of(history, DELTA, "rdp")
    curve = trade_off(history, epsilon, 2 * DELTA)
    assert curve.found_by == CLAIM_ALONE
    assert curve.true_positive_rate(0.01) == min(
        1.0, 2 * DELTA + math.exp(epsilon) * 0.01, 1 - math.exp(-epsilon) * (0.99 - 2 * DELTA)
    )


def test_what_evaluations_cost_moves_the_lines() -> None:
    """By an independent pair: randomised response of that epsilon beside one Gaussian step."""
    history, extra = ((2.0, 1.0, 1),), 0.7
    epsilon = epsilon_spent(2.0, 1.0, 1, DELTA) + extra
    curve, alone = trade_off(history, epsilon, DELTA, extra), trade_off(history, epsilon, DELTA)
    truth = 1 / (1 + math.exp(-extra))
    for alarm in RATES:
        cuts = np.linspace(
            -9, 9, 4001
        )  # thresholds of the Gaussian where the answer is yes; its ratio shifts
        late = cuts + 2 * extra * 2.0**2
        alarms = (1 - truth) * norm.sf(cuts / 2) + truth * norm.sf(late / 2)
        found = truth * norm.sf((cuts - 1) / 2) + (1 - truth) * norm.sf((late - 1) / 2)
        best = float(np.interp(alarm, alarms[::-1], found[::-1]))
        assert best - 1e-4 <= curve.true_positive_rate(alarm)
        assert alone.true_positive_rate(alarm) <= curve.true_positive_rate(alarm)


BARE = {"epsilon": 1.0, "delta": 1e-5}


@pytest.mark.parametrize(
    "history",
    [
        None, "x", {}, [[1.0, 0.5]], [[1.0, 0.5, 0.5]], [[0.0, 0.5, 1]], [[1.0, 2.0, 1]], [["1", 0.5, 1]],
        [[float("nan"), 0.5, 1]], [[float("inf"), 0.5, 1]], [[1e300, 0.5, 1]], [[0.001, 0.5, 1]],
        [[1.0, 1.0, 10**12]], [[1.0, 1.0, 90_000]],
    ],
)  # fmt: skip
def test_what_a_stranger_sends_as_history_leaves_the_claim(history: object) -> None:
    curve = curve_of({**BARE, "history": history})
    assert curve is not None
    assert curve.found_by == CLAIM_ALONE


@pytest.mark.parametrize(
    "claim", [{}, {**BARE, "delta": "x"}, {**BARE, "delta": 2.0}, {**BARE, "epsilon": -1.0}, {"epsilon": 1.0}]
)
def test_what_is_no_claim_has_no_curve(claim: dict[str, Any]) -> None:
    assert curve_of(claim) is None


def test_a_hopeless_claim_allows_for_everything() -> None:
    assert claim_alone(1e6, 1e-5).true_positive_rate(0.01) == 1.0


def test_the_largest_claim_of_a_run_is_in_its_result() -> None:
    from fedlora.server.records import _claim, _largest_claim

    epsilon = epsilon_spent(0.8, 0.05, 30, DELTA)
    spent = {
        "epsilon": epsilon, "delta": DELTA, "history": [(0.8, 0.05, 30)], "ledger_head": "f", "junk": [1] * 9,
        "accountant": "prv" * 100,
    }  # fmt: skip
    kept = _claim(spent)
    assert kept.keys() == {"epsilon", "delta", "history", "accountant"}
    assert len(kept["accountant"]) == 40
    found = _largest_claim([{"claim": {**BARE}}, {"claim": kept}, {}])
    assert found["claim"] == kept
    assert found["attacker"] == trade_off(((0.8, 0.05, 30),), epsilon, DELTA).record()
    assert _largest_claim([{"epsilon": None}]) == {}


def test_a_simulated_client_tells_its_history_and_a_node_does_not() -> None:
    from tests.privacy.test_types import spent

    claim = dataclasses.replace(spent(2000), history=((1.0, 0.008, 10),))
    assert "history" not in claim.told(count=False)
    assert claim.told(count=False, simulated=True)["history"] == ((1.0, 0.008, 10),)
    assert claim.told(count=True)["history"] == ((1.0, 0.008, 10),)

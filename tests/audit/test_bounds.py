"""The bounds: the theorem written out again, the paper's own example, and what must hold of any bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binomtest

from fedlora.audit.attack import CHOICES, bound_of
from fedlora.audit.bounds import (
    clopper_pearson,
    epsilon_bound,
    largest_bound,
    p_value,
    shared_confidence,
)


def brute_force(m: int, r: int, v: int, epsilon: float, delta: float) -> float:
    """Theorem 5.2, term by term."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max((sum(pmf[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, sum(pmf[v:]) + 2 * m * delta * alpha)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-2])
@pytest.mark.parametrize("epsilon", [0.0, 0.3, 2.0])
def test_p_value_is_the_theorem(epsilon: float, delta: float) -> None:
    for m, r, v in [(1, 0, 0), (1, 1, 1), (9, 7, 0), (9, 7, 4), (9, 7, 7), (60, 30, 25)]:
        assert p_value(m, r, v, epsilon, delta) == pytest.approx(brute_force(m, r, v, epsilon, delta))


def test_the_papers_own_example() -> None:
    """Appendix D: m = 1000, r = 100, v = 75, delta = 1e-4 shows 0.673 at 95 %."""
    assert epsilon_bound(1000, 100, 75, 1e-4, 0.95) == pytest.approx(0.673, abs=5e-4)


def test_the_bound_is_where_the_p_value_is_the_level() -> None:
    found = epsilon_bound(200, 80, 70, 1e-5, 0.95)
    assert found > 0
    assert p_value(200, 80, 70, found, 1e-5) <= 0.05 < p_value(200, 80, 70, found + 1e-4, 1e-5)


def test_all_right_without_delta_has_a_closed_form() -> None:
    """``q^m = 1 - confidence``."""
    q = 0.05 ** (1 / 300)
    assert largest_bound(300, 300, 0.0, 0.95) == pytest.approx(math.log(q / (1 - q)), abs=1e-4)


def test_half_right_shows_nothing() -> None:
    assert epsilon_bound(1000, 1000, 500, 1e-5, 0.95) == 0.0
    assert epsilon_bound(1000, 0, 0, 1e-5, 0.95) == 0.0


def test_more_right_more_shown_and_more_doubt_less() -> None:
    by_right = [epsilon_bound(500, 200, right, 1e-5, 0.95) for right in range(100, 201, 10)]
    assert by_right == sorted(by_right)
    by_delta = [epsilon_bound(500, 200, 190, delta, 0.95) for delta in (1e-2, 1e-3, 1e-5, 0.0)]
    by_confidence = [epsilon_bound(500, 200, 190, 1e-5, c) for c in (0.999, 0.99, 0.95, 0.5)]
    assert by_delta == sorted(by_delta)
    assert by_confidence == sorted(by_confidence)
    assert by_right[-1] > by_right[0]
    assert by_delta[-1] > by_delta[0]
    assert by_confidence[-1] > by_confidence[0]


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="right <= guesses <= canaries"):
        p_value(10, 11, 5, 1.0, 0.0)


@pytest.mark.parametrize(("hits", "trials"), [(0, 10), (10, 10), (3, 17), (1, 1000)])
def test_clopper_pearson_is_scipys(hits: int, trials: int) -> None:
    ours = clopper_pearson(hits, trials, 0.9)
    wanted = binomtest(hits, trials).proportion_ci(0.9, method="exact")
    assert ours == pytest.approx((wanted.low, wanted.high))


def randomised_response(epsilon: float, seed: int, m: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Scores that tell each coin with the probability that pure epsilon-DP allows, and not better."""
    rng = np.random.default_rng(seed)
    coins = rng.random(m) < 0.5
    told = np.where(rng.random(m) < 1 / (1 + math.exp(-epsilon)), coins, ~coins)
    return told + 0.1 * rng.random(m), coins


def test_a_bound_is_wrong_no_more_often_than_it_says() -> None:
    """On the mechanism for which the theorem is tight, over all the choices of an attack."""
    wrong = sum(bound_of(*randomised_response(1.0, seed), 0.0, 0.8).epsilon > 1.0 for seed in range(200))
    assert wrong <= 0.2 * 200
    near = [bound_of(*randomised_response(1.0, seed), 0.0, 0.8).epsilon for seed in range(20)]
    assert 0.6 < np.median(near) < 1.0


def test_a_perfect_attack_reaches_the_largest_bound() -> None:
    rng = np.random.default_rng(0)
    coins = rng.permutation(512) < 256
    found = bound_of(coins + 0.1 * rng.random(512), coins, 1e-5, 0.95)
    assert found.right == found.guesses
    assert found.epsilon == found.largest > 4.0
    assert found.largest == max(
        largest_bound(512, int(a * 512) + int(b * 512), 1e-5, shared_confidence(0.95, len(CHOICES)))
        for a, b in CHOICES
    )


def test_a_blind_attack_shows_nothing_much() -> None:
    rng = np.random.default_rng(0)
    bounds = [bound_of(rng.random(512), rng.random(512) < 0.5, 1e-5, 0.95).epsilon for _ in range(40)]
    assert sum(bound > 0 for bound in bounds) <= 4

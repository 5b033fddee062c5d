"""Noise that clients share: exact laws of sums on small cases, against the claimed Gaussian mechanism."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, norm

from fedlora.errors import ConfigError
from fedlora.secure import noise as product
from fedlora.secure.noise import MOST, SMOOTHING, STD, SharedNoise, clipped, drawn, seeded_words, system_words
from tests.secure.rounds import UPLOAD, Round, Terms, plain_sum

Law = np.ndarray
"""Probabilities of the integers from -``EDGE`` on."""
EDGE = 400
PLACES = np.arange(-EDGE, EDGE + 1)


def discrete(centre: float, std: float) -> Law:
    """N_Z(centre, std^2), by its definition."""
    weights = np.exp(-((PLACES - centre) ** 2) / (2 * std**2))
    return weights / math.fsum(weights)


def summed(centres: list[float], std: float) -> Law:
    """The law of the sum of one draw of each centre, by convolution."""
    laws = [discrete(centre, std) for centre in centres]
    return reduce(lambda one, other: np.convolve(one, other)[EDGE:-EDGE], laws)


def hockey_stick(p: Law, q: Law, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0).sum())


def gaussian(sigma: float, epsilon: float) -> float:
    """Balle and Wang, ICML 2018, theorem 8, for sensitivity 1."""
    return float(
        norm.cdf(1 / (2 * sigma) - epsilon * sigma)
        - math.exp(epsilon) * norm.cdf(-1 / (2 * sigma) - epsilon * sigma)
    )


@pytest.mark.parametrize("std", [2.5, 4.0, 8.0])
@pytest.mark.parametrize("honest", [1, 2, 3, 5])
@pytest.mark.parametrize("moved", [0.3, 1.0, 2.6, 7.0])
def test_a_sums_exact_divergence_is_below_that_of_the_claimed_gaussian(
    std: float, honest: int, moved: float
) -> None:
    """For real centres, in both directions, with a smaller s than the product's, which is the harder case.

    The sum's own variance, T s^2, would claim too much somewhere: what t takes off it is needed.
    """
    others, wide = [0.17, -0.41, 0.33, 0.08][: honest - 1], honest * std**2
    exceeds = False
    for offset in (0.0, 0.25, -0.38):
        p, q = summed([offset, *others], std), summed([offset + moved, *others], std)
        for epsilon in (0.0, 0.02, 0.1, 0.3, 1.0, 2.0):
            found = max(hockey_stick(p, q, epsilon), hockey_stick(q, p, epsilon))
            claimed = math.sqrt(wide - SMOOTHING**2) / moved
            assert found <= gaussian(claimed, epsilon) + 1e-12
            exceeds |= found > gaussian(math.sqrt(wide) / moved, epsilon) + 1e-15
    assert exceeds or moved < 1


def test_two_numbers_together_are_below_the_claim_of_their_norm() -> None:
    std, honest = 3.0, 2
    for first, second in ((0.6, 0.8), (3.0, 4.0), (-1.2, 0.5)):
        laws = [(summed([0.0, 0.3], std), summed([moved, 0.3], std)) for moved in (first, second)]
        p, q = (np.multiply.outer(laws[0][i], laws[1][i]) for i in (0, 1))
        sigma = math.sqrt(honest * std**2 - SMOOTHING**2) / math.hypot(first, second)
        for epsilon in (0.0, 0.1, 0.5, 1.0):
            assert hockey_stick(p, q, epsilon) <= gaussian(sigma, epsilon) + 1e-12


@pytest.mark.parametrize("honest", [2, 4])
def test_a_sum_is_pointwise_the_discrete_gaussian_of_the_sums(honest: int) -> None:
    """Within the stated factor, far out in the tails, too; at the product's own s it is below 1e-300."""
    std, centres = 1.0, [0.4, -0.2, 0.35, 0.1][:honest]
    found, ideal = summed(centres, std), discrete(sum(centres), math.sqrt(honest) * std)
    near = ideal > 1e-60
    apart = np.abs(found[near] / ideal[near] - 1).max()
    assert 1e-12 < apart < 4 * honest * math.exp(-(math.pi**2) * std**2)
    assert 4 * 1000 * math.exp(-(math.pi**2) * STD**2) < 1e-300
    assert 4 * math.exp(-2 * math.pi**2 * SMOOTHING**2) < 1e-33


def test_integers_are_drawn_by_their_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square by centre: of the product's s, and of one so small that single integers are common."""
    for std, most in ((STD, MOST), (1.3, 18)):
        monkeypatch.setattr(product, "STD", std)
        monkeypatch.setattr(product, "MOST", most)
        product._tails.cache_clear()
        for centre in (-0.5, 0.0, 0.37):
            words = seeded_words(np.random.default_rng(5))
            numbers = drawn(np.full(100_000, centre), words).astype(int)
            weights = np.exp(-((np.arange(-most, most + 1) - centre) ** 2) / (2 * std**2))
            expected = 100_000 * weights / weights.sum()
            counted = np.bincount(numbers + most, minlength=2 * most + 1)
            common = expected > 10
            statistic = ((counted - expected)[common] ** 2 / expected[common]).sum()
            assert statistic < chi2.isf(1e-6, common.sum())
    product._tails.cache_clear()


def test_probabilities_of_sizes_are_those_of_the_law_to_rounding() -> None:
    """Of exact sums by fractions of e: the far tail, too, in relative terms."""
    import mpmath

    with mpmath.workdps(60):
        masses = [mpmath.exp(-mpmath.mpf(m * m) / (2 * int(STD) ** 2)) for m in range(MOST + 1)]
        whole = masses[0] + 2 * mpmath.fsum(masses[1:])
        for size in (1, 2, 33, 200, MOST - 1, MOST):
            exact = 2 * mpmath.fsum(masses[size:]) / whole
            assert float(abs(product._tails()[MOST - size] / exact - 1)) < 1e-13


SHARED = SharedNoise(clipping_norm=0.5, noise_multiplier=0.8, honest=3, clients=5, bits=32)


@given(st.floats(1e-3, 1e3), st.floats(0.05, 50), st.integers(1, 40), st.integers(0, 40))
def test_the_honest_ones_noise_is_worth_the_multiplier(
    norm_: float, multiplier: float, honest: int, more: int
) -> None:
    shared = SharedNoise(
        clipping_norm=norm_, noise_multiplier=multiplier, honest=honest, clients=honest + more, bits=64
    )
    left = math.sqrt(honest * STD**2 - SMOOTHING**2) * shared.width
    assert left == pytest.approx(multiplier * norm_)


@pytest.mark.parametrize("vanished", [(), (1,), (0, 4)])
def test_a_masked_sum_is_that_of_the_changes_with_the_noise_of_who_is_in_it(
    vanished: tuple[int, ...],
) -> None:
    """Under masks, in a round that some leave: the mean is unbiased, noise of T = 3 is there at least."""
    rng = np.random.default_rng(3)
    changes = {c: clipped(rng.normal(size=20_000), 0.5) for c in range(5)}
    rows = {c: SHARED.encode(x, seeded_words(np.random.default_rng(c))) for c, x in changes.items()}
    terms = Terms(min_clients=3, share=0.6, bits=32)
    total = Round(terms=terms, values=rows, vanish=dict.fromkeys(vanished, UPLOAD)).run()
    there = [c for c in range(5) if c not in vanished]
    assert np.array_equal(total, plain_sum(rows, there))
    left = SHARED.decode(total) - sum(changes[c] for c in there)
    assert left.std() == pytest.approx(math.sqrt(len(there)) * STD * SHARED.width, rel=0.02)
    assert left.std() > 0.97 * 0.8 * 0.5
    assert abs(left.mean()) < 5 * left.std() / math.sqrt(len(left))


def test_no_sum_wraps_around() -> None:
    """The largest number with the largest noise of everybody, at the finest grid that is accepted."""
    for number in (0.5, -0.5):
        extreme = SHARED.encode(np.array([number]), lambda n: np.zeros(n, np.uint64))
        size = round(0.5 / SHARED.width)
        drawn_most = abs(int(extreme.view("<i4")[0]) - math.copysign(size, number))
        assert MOST - 1 <= drawn_most <= MOST + 1
    coarse = 2**31 / 5 - MOST - 2
    finest = math.sqrt(3 * STD**2 - SMOOTHING**2) / coarse
    replace(SHARED, noise_multiplier=finest * 1.001)
    with pytest.raises(ConfigError, match="its grid is too fine for sums of 5 clients in"):
        replace(SHARED, noise_multiplier=finest * 0.999)


@pytest.mark.parametrize("spoil", [math.nan, math.inf, -math.inf, 1e300])
def test_a_change_that_is_not_finite_counts_as_zero(spoil: float) -> None:
    """Also one whose norm overflows; whether it was there cannot be told from a zero update."""
    words: Callable[[], product.Words] = lambda: seeded_words(np.random.default_rng(1))  # noqa: E731
    change = np.linspace(-1, 1, 50)
    change[7] = spoil
    assert np.array_equal(SHARED.encode(change, words()), SHARED.encode(np.zeros(50), words()))


def test_a_change_is_cut_to_the_norm_and_short_ones_are_left() -> None:
    for change in (np.full(9, 3.0), np.full(9, 1e-3)):
        length = float(np.linalg.norm(change))
        assert np.linalg.norm(clipped(change, 0.5)) == pytest.approx(min(length, 0.5))
    assert len(SHARED.encode(np.zeros(0), system_words)) == 0


def test_noise_of_the_operating_system_is_no_other_noise() -> None:
    change = np.zeros(2000)
    one, other = (SHARED.encode(change, system_words).view("<i4") for _ in range(2))
    assert not np.array_equal(one, other)
    assert one.std() == pytest.approx(STD, rel=0.1)


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 2000), st.integers(3, 50))
def test_the_claim_is_no_smaller_than_the_published_bound(d: int, honest: int) -> None:
    """Kairouz et al., theorem 1, with rounding at no cost; ours lies above by t alone."""
    shared = replace(SHARED, honest=honest, clients=honest)
    moved = shared.clipping_norm / shared.width
    tau = 10 * sum(math.exp(-2 * (math.pi * STD) ** 2 * k / (k + 1)) for k in range(1, honest))
    spread = math.sqrt(honest) * STD
    published = min(math.sqrt((moved / spread) ** 2 + tau * d / 2), moved / spread + tau * math.sqrt(d))
    ours = 1 / shared.noise_multiplier
    assert published <= ours <= published * (1 + 0.6 * SMOOTHING**2 / (honest * STD**2) + 1e-12)


def test_dropping_below_the_counted_noise_is_refused_by_everybody() -> None:
    rows = {c: SHARED.encode(np.zeros(4), system_words) for c in range(5)}
    terms = Terms(min_clients=4, share=0.6, bits=32)
    for gone in itertools.combinations(range(5), 2):
        with pytest.raises(Exception, match="3 clients uploaded"):
            Round(terms=terms, values=rows, vanish=dict.fromkeys(gone, UPLOAD)).run()

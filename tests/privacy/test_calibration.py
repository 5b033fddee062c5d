"""Epsilon against an independent implementation, and the laws that noise and budget obey."""

from __future__ import annotations

import math
import warnings
from functools import lru_cache

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis.prv import PoissonSubsampledGaussianPRV, compute_safe_domain_size
from scipy.optimize import brentq
from scipy.stats import norm

from fedlora.errors import ConfigError
from fedlora.privacy.accountants import ACCOUNTANTS, DELTA_ERROR, EPSILON_ERROR, History, safe_domain_size
from fedlora.privacy.calibration import MIN_NOISE, calibrate_noise, epsilon_of, epsilon_spent
from fedlora.privacy.types import PrivacySpent

DELTA = 1e-5
SETTINGS = [
    (0.5, 0.01, 1000),
    (0.5, 1.0, 1),
    (0.8, 0.02, 100),
    (0.8, 0.001, 1),
    (1.0, 0.1, 30),
    (1.5, 0.3, 20),
    (2.0, 0.001, 1000),
    (4.0, 1.0, 10),
    (8.0, 0.01, 1),
    (8.0, 0.5, 100),
    (8.0, 1.0, 1000),
    (50.0, 0.01, 100),
]
"""Noise multiplier, sample rate, steps."""
MIXED = ((1.0, 0.05, 20), (2.0, 0.3, 5), (1.2, 0.01, 100))


@lru_cache
def reference(history: History, delta: float = DELTA) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    for noise, rate, steps in history:
        gaussian = dp_accounting.GaussianDpEvent(noise)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(rate, gaussian), steps)
    return float(accountant.get_epsilon(delta))


def gaussian_epsilon(mu: float, delta: float = DELTA) -> float:
    """The exact epsilon of Gaussian steps on all examples (Balle and Wang, ICML 2018, theorem 8)."""

    def excess(epsilon: float) -> float:
        above, below = norm.cdf(mu / 2 - epsilon / mu), norm.logcdf(-mu / 2 - epsilon / mu)
        return float(above - math.exp(epsilon + below) - delta)

    return float(brentq(excess, 0.0, 500.0, xtol=1e-10))


@pytest.mark.parametrize("setting", SETTINGS)
def test_prv_and_pld_are_googles_pld_and_rdp_is_above(setting: tuple[float, float, int]) -> None:
    true = reference((setting,))
    prv, pld, rdp = (epsilon_spent(*setting, DELTA, accountant) for accountant in ("prv", "pld", "rdp"))
    assert abs(prv - true) <= max(0.02, 0.01 * true)
    assert pld == pytest.approx(true, rel=1e-4, abs=1e-4)
    assert rdp >= max(true, pld) - 1e-4
    assert rdp <= 1.5 * true or true < 1 or setting[2] == 1


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
@pytest.mark.parametrize(
    "history", [((2.0, 1.0, 3),), ((0.6, 1.0, 1),), ((3.0, 1.0, 4), (5.0, 1.0, 10), (1.5, 1.0, 1))]
)
def test_without_sampling_the_exact_epsilon_is_never_understated(history: History, accountant: str) -> None:
    """Gaussian steps add up exactly: mu^2 = sum of steps / noise^2."""
    exact = gaussian_epsilon(math.sqrt(sum(steps / noise**2 for noise, _, steps in history)))
    epsilon = epsilon_of(history, DELTA, accountant)
    assert epsilon >= exact - 1e-6
    assert epsilon <= (1.12 * exact if accountant == "rdp" else exact + 0.02)


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_a_mixed_history_is_composed_as_it_is(accountant: str) -> None:
    true, epsilon = reference(MIXED), epsilon_of(MIXED, DELTA, accountant)
    if accountant == "rdp":
        assert true <= epsilon <= 1.5 * true
    else:
        assert abs(epsilon - true) <= max(0.02, 0.01 * true)


@pytest.mark.parametrize("accountant", ["prv", "pld", "rdp"])
def test_neither_order_nor_division_of_a_history_matters(accountant: str) -> None:
    whole = epsilon_of(MIXED, DELTA, accountant)
    divided = ((1.2, 0.01, 60), MIXED[1], (3.0, 0.5, 0), MIXED[0], (1.2, 0.01, 40))
    assert epsilon_of(MIXED[::-1], DELTA, accountant) == whole
    assert epsilon_of(divided, DELTA, accountant) == whole
    rounds = ((1.0, 0.05, 10),) * 7
    assert epsilon_of(rounds, DELTA, accountant) == epsilon_spent(1.0, 0.05, 70, DELTA, accountant)


def test_the_account_is_computed_once() -> None:
    """The decision to train again reads what was computed when the round was reserved."""
    epsilon_of(MIXED, DELTA, "rdp")
    before = epsilon_of.cache_info()
    epsilon_of(MIXED, DELTA, "rdp")
    assert epsilon_of.cache_info().hits == before.hits + 1
    assert epsilon_of.cache_info().misses == before.misses


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(8.0, 0.02, 100), (1.0, 0.01, 400), (0.1, 0.005, 50), (3.0, 1.0, 5)]
)
def test_calibrated_noise_is_the_least_that_keeps_the_budget(
    target: float, rate: float, steps: int, accountant: str
) -> None:
    noise = calibrate_noise(target, DELTA, rate, steps, accountant)
    assert epsilon_spent(noise, rate, steps, DELTA, accountant) <= target
    assert epsilon_spent(noise * 0.99, rate, steps, DELTA, accountant) > target


def test_pld_calibrates_to_the_noise_of_prv_and_below_what_prv_resolves() -> None:
    noise = calibrate_noise(1.0, DELTA, 0.05, 20, "pld")
    assert epsilon_spent(noise, 0.05, 20, DELTA, "pld") <= 1.0
    assert epsilon_spent(noise * 0.99, 0.05, 20, DELTA, "pld") > 1.0
    assert noise == pytest.approx(calibrate_noise(1.0, DELTA, 0.05, 20, "prv"), rel=0.01)
    small = calibrate_noise(0.005, DELTA, 0.01, 10, "pld")
    assert epsilon_spent(small, 0.01, 10, DELTA, "pld") <= 0.005


def test_where_any_noise_would_do_the_least_one_is_planned() -> None:
    """Delta covers that an example is in a batch at all, so epsilon does not bind."""
    noise = calibrate_noise(8.0, 0.5, 0.001, 1)
    assert noise == pytest.approx(MIN_NOISE)
    assert epsilon_spent(noise, 0.001, 1, 0.5) < 8.0


def test_calibrated_noise_can_always_be_accounted_for() -> None:
    """Here prv is far below rdp, whose bound says what prv may be asked for."""
    noise = calibrate_noise(100.0, DELTA, 1e-6, 10)
    assert epsilon_spent(noise, 1e-6, 10, DELTA) <= 100.0


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(("noise", "rate", "steps"), [(0.7, 0.02, 100), (1.3, 0.1, 50), (6.0, 0.2, 30)])
def test_calibration_inverts_the_account(noise: float, rate: float, steps: int, accountant: str) -> None:
    spent = epsilon_spent(noise, rate, steps, DELTA, accountant)
    assert calibrate_noise(spent, DELTA, rate, steps, accountant) == pytest.approx(noise, rel=2e-3)


@settings(max_examples=10, deadline=None)
@given(
    noise=st.floats(0.8, 8.0),
    rate=st.floats(0.005, 0.3),
    steps=st.integers(1, 200),
    delta=st.sampled_from([1e-7, 1e-5, 1e-3]),
)
def test_epsilon_falls_with_noise_and_delta_and_grows_with_steps_and_rate(
    noise: float, rate: float, steps: int, delta: float
) -> None:
    here = epsilon_spent(noise, rate, steps, delta, "rdp")
    assert epsilon_spent(noise * 1.2, rate, steps, delta, "rdp") <= here + 1e-9
    assert epsilon_spent(noise, rate * 1.2, steps, delta, "rdp") >= here - 1e-9
    assert epsilon_spent(noise, rate, steps + 5, delta, "rdp") >= here - 1e-9
    assert epsilon_spent(noise, rate, steps, delta * 5, "rdp") <= here + 1e-9


def test_prv_obeys_the_same_laws() -> None:
    here = epsilon_spent(1.0, 0.05, 50, DELTA)
    assert epsilon_spent(1.1, 0.05, 50, DELTA) < here < epsilon_spent(0.9, 0.05, 50, DELTA)
    assert epsilon_spent(1.0, 0.04, 50, DELTA) < here < epsilon_spent(1.0, 0.05, 60, DELTA)


@pytest.mark.parametrize("accountant", sorted(ACCOUNTANTS))
def test_the_edges(accountant: str) -> None:
    assert epsilon_spent(1.0, 0.1, 0, DELTA, accountant) == 0.0
    assert epsilon_of((), DELTA, accountant) == 0.0
    assert epsilon_spent(0.0, 0.1, 1, DELTA, accountant) == math.inf
    assert epsilon_spent(math.nan, 0.1, 1, DELTA, accountant) == math.inf
    assert epsilon_of(((8.0, 0.1, 1), (0.0, 0.001, 1)), DELTA, accountant) == math.inf


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
def test_a_target_that_no_noise_reaches_is_refused(accountant: str) -> None:
    with pytest.raises(ConfigError, match=r"privacy\.target-epsilon = 0\.001: no noise reaches it"):
        calibrate_noise(0.001, DELTA, 0.01, 10, accountant)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((8.0, DELTA, 1.5, 10, "prv"), "sample rate = 1.5"),
        ((8.0, DELTA, 0.0, 10, "prv"), "sample rate = 0"),
        ((8.0, 0.0, 0.1, 10, "prv"), r"privacy\.target-delta = 0\.0"),
        ((0.0, DELTA, 0.1, 10, "prv"), r"privacy\.target-epsilon = 0\.0"),
        ((1000.0, DELTA, 0.1, 10, "prv"), r"privacy\.target-epsilon = 1000\.0"),
        ((8.0, DELTA, 0.1, 0, "prv"), "steps = 0"),
        ((8.0, DELTA, 0.1, -1, "prv"), "steps = -1"),
        ((math.nan, DELTA, 0.1, 10, "prv"), r"privacy\.target-epsilon = nan"),
        ((8.0, DELTA, math.nan, 10, "prv"), "sample rate = nan"),
        ((8.0, 1e-11, 0.1, 10, "pld"), r"privacy\.target-delta = 1e-11: .* resolves 1e-10 or more"),
        ((8.0, DELTA, 0.1, 10**6, "prv"), r"steps = 1e\+06: .* at most 100,000; \"rdp\" gives a bound"),
        ((8.0, DELTA, 0.1, 10, "gdp"), r"privacy\.accountant = 'gdp' .*: accepted are prv, rdp, pld"),
    ],
)
def test_arguments_out_of_range_are_refused(
    arguments: tuple[float, float, float, int, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate_noise(*arguments)


@pytest.mark.parametrize("accountant", ["prv", "pld"])
def test_what_the_tight_accountants_cannot_resolve_is_refused_and_rdp_still_bounds_it(
    accountant: str,
) -> None:
    with pytest.raises(ConfigError, match=r'noise-multiplier = 0\.2: .*near \d+; "rdp" gives a bound'):
        epsilon_spent(0.2, 0.5, 1000, DELTA, accountant)
    assert epsilon_spent(0.2, 0.5, 1000, DELTA, "rdp") > 1000
    with pytest.raises(ConfigError, match=r"noise-multiplier = 0\.04: .* resolves at least 0\.05"):
        epsilon_spent(0.04, 0.001, 1, DELTA, accountant)
    assert epsilon_spent(0.04, 0.001, 1, DELTA, "rdp") > 100


def test_the_highest_target_can_be_accounted_for() -> None:
    """The limits of calibration and account fit together."""
    noise = calibrate_noise(100.0, DELTA, 1.0, 1)
    assert 99.0 < epsilon_spent(noise, 1.0, 1, DELTA) <= 100.0


@pytest.mark.parametrize("steps", [1, 2, 7, 64, 65, 400])
@pytest.mark.parametrize(("noise", "rate"), [(0.6, 0.02), (1.1, 0.3), (4.0, 1.0)])
def test_the_quick_account_is_the_slow_one_but_for_the_last_digits(
    noise: float, rate: float, steps: int
) -> None:
    history = ((noise, rate, steps),)
    assert epsilon_of(history, DELTA, quick=True) == pytest.approx(epsilon_of(history, DELTA), rel=1e-6)


@pytest.mark.parametrize(
    ("noise", "rate", "most"), [(0.8, 0.1, 8), (1.3, 0.02, 1024), (0.3, 0.5, 1), (20.0, 1.0, 64)]
)
def test_the_domain_of_prv_is_that_of_opacus(noise: float, rate: float, most: int) -> None:
    """Bit by bit: noise was calibrated with it."""
    loss = PoissonSubsampledGaussianPRV(rate, noise)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = safe_domain_size(noise, rate, most, DELTA_ERROR * DELTA)
        wanted = compute_safe_domain_size([loss], [most], EPSILON_ERROR, DELTA_ERROR * DELTA)
    assert found == wanted


def test_prv_never_says_less_than_nothing() -> None:
    for quick in (False, True):
        assert epsilon_of(((1000.0, 0.01, 1),), 1e-2, quick=quick) == 0.0


def test_what_was_spent_says_what_it_means() -> None:
    spent = PrivacySpent(
        epsilon=1.0,
        delta=DELTA,
        granularity="example",
        neighboring_relation="zero_out_one",
        sampling_method="poisson",
        accountant="prv",
        noise_multiplier=1.0,
        sample_rate=0.1,
        steps=3,
    )
    with pytest.raises(AttributeError):
        spent.epsilon = 0.5  # type: ignore[misc]

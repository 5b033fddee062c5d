"""Epsilon against an independent implementation, and the laws that noise and budget obey."""

from __future__ import annotations

import math

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ConfigError
from fedlora.privacy.calibration import calibrate_noise, epsilon_spent
from fedlora.privacy.types import PrivacySpent

DELTA = 1e-5
SETTINGS = [
    (0.8, 0.02, 100),
    (1.0, 0.01, 100),
    (1.0, 0.1, 30),
    (2.0, 0.01, 10),
    (1.5, 0.3, 20),
    (4.0, 1.0, 10),
    (10.0, 0.2, 100),
    (50.0, 0.01, 100),
]


def reference(noise_multiplier: float, sample_rate: float, steps: int, delta: float = DELTA) -> float:
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    event = dp_accounting.PoissonSampledDpEvent(sample_rate, dp_accounting.GaussianDpEvent(noise_multiplier))
    return float(accountant.compose(event, steps).get_epsilon(delta))


@pytest.mark.parametrize("setting", SETTINGS)
def test_prv_is_googles_pld_and_rdp_is_above(setting: tuple[float, float, int]) -> None:
    true = reference(*setting)
    prv, rdp = (epsilon_spent(*setting, DELTA, accountant) for accountant in ("prv", "rdp"))
    assert abs(prv - true) <= max(0.02, 0.01 * true)
    assert rdp >= true
    assert rdp <= 1.5 * true or true < 1


@pytest.mark.parametrize("accountant", ["prv", "rdp"])
@pytest.mark.parametrize(
    ("target", "rate", "steps"), [(8.0, 0.02, 100), (1.0, 0.01, 400), (0.1, 0.005, 50), (3.0, 1.0, 5)]
)
def test_calibrated_noise_is_the_least_that_keeps_the_budget(
    target: float, rate: float, steps: int, accountant: str
) -> None:
    noise = calibrate_noise(target, DELTA, rate, steps, accountant)
    assert epsilon_spent(noise, rate, steps, DELTA, accountant) <= target
    assert epsilon_spent(noise * 0.997, rate, steps, DELTA, accountant) > target


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


def test_the_edges() -> None:
    assert epsilon_spent(1.0, 0.1, 0, DELTA) == 0.0
    assert epsilon_spent(0.0, 0.1, 1, DELTA) == math.inf


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
        ((8.0, DELTA, 0.1, 10, "gdp"), r"privacy\.accountant = 'gdp': accepted are prv, rdp"),
    ],
)
def test_arguments_out_of_range_are_refused(
    arguments: tuple[float, float, float, int, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        calibrate_noise(*arguments)


def test_an_epsilon_that_prv_cannot_resolve_is_refused_and_rdp_still_bounds_it() -> None:
    with pytest.raises(ConfigError, match=r'privacy\.noise-multiplier = 0\.05: epsilon is near .* or "rdp"'):
        epsilon_spent(0.05, 0.5, 1000, DELTA)
    assert epsilon_spent(0.05, 0.5, 1000, DELTA, "rdp") > 1000


def test_the_highest_target_can_be_accounted_for() -> None:
    """The limits of calibration and account fit together."""
    noise = calibrate_noise(100.0, DELTA, 1.0, 1)
    assert 99.0 < epsilon_spent(noise, 1.0, 1, DELTA) <= 100.0


def test_what_was_spent_says_what_it_means() -> None:
    spent = PrivacySpent(
        epsilon=1.0,
        delta=DELTA,
        granularity="example",
        neighboring_relation="add_or_remove_one",
        sampling_method="poisson",
        accountant="prv",
        noise_multiplier=1.0,
        sample_rate=0.1,
        steps=3,
    )
    with pytest.raises(AttributeError):
        spent.epsilon = 0.5  # type: ignore[misc]

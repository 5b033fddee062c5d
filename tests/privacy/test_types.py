"""What of a privacy loss leaves the client."""

from __future__ import annotations

import dataclasses

from fedlora.privacy.calibration import epsilon_spent
from fedlora.privacy.types import PrivacySpent


def spent(examples: int) -> PrivacySpent:
    """After ten steps of 16 examples."""
    rate = 16 / examples
    return PrivacySpent(
        epsilon=epsilon_spent(1.0, rate, 10, 1e-5, "rdp"), delta=1e-5, granularity="example",
        neighboring_relation="zero_out_one", sampling_method="poisson", accountant="rdp",
        noise_multiplier=1.0, sample_rate=rate, steps=10,
    )  # fmt: skip


def test_whoever_does_not_tell_the_count_tells_nothing_that_separates_near_ones() -> None:
    some, more = spent(2000), spent(2010)
    assert some.epsilon != more.epsilon
    assert some.told(count=False) == more.told(count=False)
    assert not {"sample_rate", "noise_multiplier"} & some.told(count=False).keys()


def test_rounding_never_tells_less_than_was_spent() -> None:
    for examples in range(200, 4000, 37):
        whole = spent(examples)
        assert whole.epsilon <= whole.told(count=False)["epsilon"] < whole.epsilon + 0.01  # type: ignore[operator]


def test_with_the_count_everything_is_told() -> None:
    assert spent(500).told(count=True) == dataclasses.asdict(spent(500))

"""The exact test and its power against independent calculations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import permutation_test

from fedlora.study.analyse.comparisons import undecidable
from fedlora.study.analyse.sign_flip import detectable, least_p, sign_flip


def by_hand(differences: list[float]) -> float:
    """All signs, one after the other, in whole numbers."""
    whole = [round(d * 2400) for d in differences]
    flips = [abs(sum(s * d for s, d in zip(signs, whole, strict=True)))
             for signs in itertools.product((1, -1), repeat=len(whole))]  # fmt: skip
    return sum(flip >= abs(sum(whole)) for flip in flips) / len(flips)


def test_it_counts_all_signs_and_ties_by_value_not_by_rounding() -> None:
    """Accuracies are counts over the test set; as floating-point numbers equal sums differ in last bits."""
    rng = np.random.default_rng(1)
    for _ in range(30):
        counts, others = rng.integers(1900, 1912, 8), rng.integers(1900, 1912, 8)
        found = [float(a / 2400 - b / 2400) for a, b in zip(counts, others, strict=True)]
        assert sign_flip(found) == by_hand(found)


def test_beyond_what_is_exact_it_draws() -> None:
    found = list(np.random.default_rng(2).normal(0.4, 1.0, 20))
    expected = permutation_test((np.asarray(found),), np.mean, permutation_type="samples", n_resamples=50_000,
                                vectorized=True, rng=np.random.default_rng(3)).pvalue  # fmt: skip
    assert sign_flip(found) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize(("count", "family"), [(10, 1), (10, 12), (12, 5)])
def test_the_rule_that_decides_finds_the_detectable_difference_in_four_of_five(
    count: int, family: int
) -> None:
    found = detectable(count, 0.05 / family)
    assert found is not None
    studies = np.random.default_rng(7).normal(found, 1.0, (600, count))
    decided = np.mean([sign_flip(list(differences)) * family <= 0.05 for differences in studies])
    assert decided == pytest.approx(0.8, abs=0.05)


def test_what_can_never_be_decided_is_named() -> None:
    assert least_p(5) == sign_flip([0.01] * 5) == 0.0625
    assert detectable(10, 0.05 / 26) is None
    assert detectable(10, 0.05 / 25) is not None
    assert undecidable(10, 25) == undecidable(11, 26) == undecidable(3, 0) == ""
    assert undecidable(10, 26).endswith("it takes 25 at most, or 11 seeds")
    assert undecidable(9, 1) == "a claim wants 10 seeds, there are 9"

"""Membership inference: the AUC by its definition, intervals that hold, and what is not resolvable."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, norm

from fedlora.audit.membership import FEWEST, auc, membership, true_positives


def test_auc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.integers(0, 9, 40), rng.integers(0, 7, 30)  # with ties
    pairs = [(a > b) + 0.5 * (a == b) for a in inside for b in outside]
    assert auc(inside, outside).value == pytest.approx(np.mean(pairs))


def test_the_interval_of_the_auc_covers_as_often_as_it_says() -> None:
    true = norm.cdf(0.5 / 2**0.5)
    rng = np.random.default_rng(1)
    measured = [auc(rng.normal(0.5, 1, 120), rng.normal(0, 1, 80)) for _ in range(400)]
    assert 0.92 <= np.mean([found.low <= true <= found.high for found in measured]) <= 0.98


def test_true_positives_at_a_threshold_that_few_non_members_exceed() -> None:
    rng = np.random.default_rng(2)
    inside, outside = rng.normal(1, 1, 300), rng.normal(0, 1, 1000)
    found = true_positives(inside, outside, 0.01)
    assert found.rate is not None
    threshold = np.quantile(outside, 0.99)
    assert found.rate.value == pytest.approx((inside > threshold).mean(), abs=0.01)
    hits = round(found.rate.value * 300)
    interval = binomtest(hits, 300).proportion_ci(0.95, method="exact")
    assert (found.rate.low, found.rate.high) == pytest.approx((interval.low, interval.high))


def test_members_that_score_like_non_members_are_not_found() -> None:
    scores = np.arange(1000.0)
    found = true_positives(scores, scores, 0.01)
    assert found.rate is not None
    assert found.rate.value == 0.01


def test_too_few_non_members_resolve_nothing() -> None:
    inside = np.arange(50.0)
    enough = round(FEWEST / 0.01)
    assert true_positives(inside, np.arange(enough - 1.0), 0.01).rate is None
    assert true_positives(inside, np.arange(float(enough)), 0.01).rate is not None
    at = membership(inside, np.arange(float(enough))).true_positives
    assert [t.rate is None for t in at] == [False, True]
    assert [t.non_members_needed for t in at] == [500, 5000]

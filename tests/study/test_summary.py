"""Intervals and differences against independent calculations."""

from __future__ import annotations

import pytest
from scipy.stats import ttest_1samp

from fedlora.study.analyse.intervals import of_examples, over_seeds
from fedlora.study.analyse.summary import summarise
from tests.study.made_up import result


@pytest.mark.parametrize(("accuracy", "examples"), [(0.8, 600), (0.5, 10), (0.0, 20), (1.0, 20)])
def test_wilson_interval_solves_its_equation(accuracy: float, examples: int) -> None:
    """The bounds are the p with (accuracy - p)^2 = z^2 p (1 - p) / n."""
    found = of_examples(accuracy, examples)
    for bound in (found.low, found.high):
        assert bound is not None
        assert (accuracy - bound) ** 2 == pytest.approx(
            1.959964**2 * bound * (1 - bound) / examples, abs=1e-7
        )
    assert found.low is not None
    assert found.low <= accuracy <= (found.high or 0)


def test_interval_over_seeds_is_students() -> None:
    values = [0.81, 0.83, 0.80, 0.84]
    expected = ttest_1samp(values, 0.0).confidence_interval(0.95)
    found = over_seeds(values)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_interval_over_seeds_stays_within_what_is_possible() -> None:
    found = over_seeds([0.7, 0.99])
    assert (found.low, found.high) == (0.0, 1.0)


def test_local_only_is_the_mean_of_its_clients_within_a_seed() -> None:
    runs = [
        result("local-only", "reference", accuracy=a, seed=s, label=f"local-only-{k}-seed-{s}")
        for s, accuracies in enumerate(([0.6, 0.7], [0.7, 0.8]))
        for k, a in enumerate(accuracies)
    ]
    (row,) = summarise(runs)
    assert row.score_by_seed == pytest.approx({0: 0.65, 1: 0.75})
    assert row.score.low == pytest.approx(over_seeds([0.65, 0.75]).low)
    assert row.seconds == pytest.approx(2 * 31.5)
    assert (row.bytes_up, row.bytes_down, row.gap) == (None, None, None)


def test_gap_is_that_of_the_last_round_with_one_and_epsilon_the_largest() -> None:
    run = result("ffa", epsilon=7.5)
    run.rounds[-2]["gap"], run.rounds[-1]["gap"] = 0.125, float("nan")
    (row,) = summarise([run, result("ffa", epsilon=8.0, seed=1)])
    assert row.gap == pytest.approx((0.125 + row.results[1].rounds[-1]["gap"]) / 2)
    assert row.epsilon == 8.0

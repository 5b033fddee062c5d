"""What a study tells apart without anybody having declared it, against independent calculations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t, ttest_rel

from fedlora.study.analyse.contests import Contest, contests, difference, exact_and_behind
from fedlora.study.analyse.summary import Row, summarise
from tests.study.made_up import TEST_SIZE, result

Z = 1.959964


def only(*results: object) -> Contest:
    (contest,) = contests(summarise(results))  # type: ignore[arg-type]
    return contest


def seeds(name: str, accuracies: list[float]) -> list[object]:
    return [result(name, accuracy=a, seed=s) for s, a in enumerate(accuracies)]


def wilson(share: float, n: int, z: float) -> tuple[float, float]:
    """Both p with (share - p)^2 = z^2 p (1 - p) / n."""
    low, high = sorted(np.roots([1 + z**2 / n, -(2 * share + z**2 / n), share**2]).real)
    return float(low), float(high)


def test_differences_are_paired_by_seed_whatever_their_order() -> None:
    mine, theirs = {0: 0.80, 1: 0.85, 2: 0.90}, {2: 0.86, 0: 0.77, 1: 0.83}
    row, other = summarise(
        [result("flora", accuracy=a, seed=s) for s, a in mine.items()]
        + [result("fedavg", accuracy=a, seed=s) for s, a in theirs.items()]
    )
    found = difference(row, other)
    expected = ttest_rel(list(mine.values()), [theirs[s] for s in mine]).confidence_interval(0.95)
    assert found.value == pytest.approx(0.03)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_one_seed_has_newcombes_interval() -> None:
    row, other = summarise([result("flora", accuracy=0.8), result("ffa", accuracy=0.775)])
    (l1, u1), (l2, u2) = (wilson(p, TEST_SIZE, Z) for p in (0.8, 0.775))
    found = difference(row, other)
    assert found.low == pytest.approx(0.025 - math.hypot(0.8 - l1, u2 - 0.775), abs=1e-7)
    assert found.high == pytest.approx(0.025 + math.hypot(u1 - 0.8, 0.775 - l2), abs=1e-7)


def test_the_intervals_of_all_pairs_hold_together() -> None:
    """In studies in which no method differs, hardly one in twenty tells any two apart."""
    rng, names, wrong = np.random.default_rng(0), ("a", "b", "c", "d"), 0
    for _ in range(60):
        runs = [
            result(name, "variant", accuracy=float(a), seed=s, num_rounds=1, keys={"strategy.name": "fedavg"})
            for name in names
            for s, a in enumerate(rng.normal(0.7, 0.02, 4))
        ]
        wrong += not only(*runs).undecided
    assert wrong <= 60 * 0.05 + 2 * math.sqrt(60 * 0.05 * 0.95)


def test_the_family_is_all_pairs_of_the_study() -> None:
    names = ("flora", "ffa", "fedavg")
    rows = summarise([result(n, setting=s, seed=k, accuracy=0.7 + 0.01 * k * len(n) + 0.02 * (n == "ffa"))
                      for n in names for s in "ab" for k in range(3)])  # fmt: skip
    found = contests(rows)
    assert [contest.family for contest in found] == [6, 6]
    first, second = found[0].rows[:2]
    gap = [first.score_by_seed[k] - second.score_by_seed[k] for k in range(3)]
    half = t.ppf(1 - 0.025 / 6, 2) * np.std(gap, ddof=1) / math.sqrt(3)
    assert found[0].difference(first, second).high == pytest.approx(np.mean(gap) + half)


def test_one_seed_tells_apart_what_the_test_set_allows() -> None:
    contest = only(*(result(n, accuracy=a) for n, a in (("ffa", 0.79), ("flora", 0.74), ("fedavg", 0.80))))
    assert [row.name for row in contest.rows] == ["fedavg", "ffa", "flora"]
    assert [row.name for row in contest.tied] == ["fedavg", "ffa"]
    assert not contest.undecided


@pytest.mark.parametrize(
    ("gains", "gain"),
    [
        ([0.05, 0.051, 0.049], "enough"),
        ([0.03, 0.05, 0.01], "open"),
        ([0.022, 0.0, 0.044], "open"),
        ([0.001, 0.0, -0.001], "too little"),
        ([-0.1, -0.101, -0.099], "too little"),
    ],
)
def test_a_gain_wants_its_whole_interval(gains: list[float], gain: str) -> None:
    """A mean of +2.2 points that another seed may turn is no gain of at least 2 points."""
    contest = only(*seeds("flora", [0.7 + g for g in gains]), *seeds("head-only", [0.7] * 3))
    (row,) = (row for row in contest.rows if row.name == "flora")
    assert contest.gain(row) == gain
    assert contest.control is not None
    assert contest.gain(contest.control) is None


def test_variants_and_own_methods_compete() -> None:
    own = result("mine", "variant", accuracy=0.87, keys={"strategy.name": "fedlora.tests:Mine"})
    contest = only(result("zero-padding", accuracy=0.802), own)
    assert [row.name for row in contest.rows] == ["mine", "zero-padding"]


def test_only_the_same_setting_and_privacy_is_compared() -> None:
    runs = [
        result("a", setting="x"), result("b", setting="x"), result("a", setting="y"),
        result("c", setting="x", epsilon=7.9), result("d", setting="x", epsilon=8.0),
        result("e", setting="x", epsilon=3.0),
        result("f", setting="x", epsilon=8.0, keys={"privacy.target-delta": 1e-6}),
        result("g", setting="x", keys={"privacy.mode": "client", "privacy.noise-multiplier": 1.0}),
        result("centralised", "reference", setting="x"),
    ]  # fmt: skip
    for run in runs:
        object.__setattr__(run, "kind", "variant" if run.kind == "strategy" else run.kind)
    found = [sorted(row.method for row in contest.rows) for contest in contests(summarise(runs))]
    assert found == [["a", "b"], ["a"], ["c", "d"], ["e"], ["f"], ["g"]]


def test_an_exact_method_that_loses_is_named() -> None:
    def rows(accuracy: float) -> list[Row]:
        return summarise([result("fedavg", accuracy=0.8), result("flora", accuracy=accuracy)])

    assert exact_and_behind(rows(0.68)) == ["flora"]
    assert exact_and_behind(rows(0.79)) == []

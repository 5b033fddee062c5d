"""Paired claims against independent calculations."""

from __future__ import annotations

import math

import pytest
from scipy.stats import ttest_1samp, ttest_rel

from fedlora.errors import ConfigError
from fedlora.study.analyse.comparisons import Comparison, _p_alike, compare, declared, holm
from fedlora.study.analyse.intervals import over_seeds
from fedlora.study.analyse.sign_flip import sign_flip
from fedlora.study.analyse.summary import Row, summarise
from fedlora.study.report.findings import claims
from tests.study.made_up import result

SEEDS = range(10)
NOISE = [0.004, -0.003, 0.002, -0.004, 0.001, 0.003, -0.002, 0.0, -0.001, 0.002]


def rows(gains: dict[str, float], seeds: int = 10, setting: str = "", wobble: float = 1.0) -> list[Row]:
    """Methods that are ahead of ``base`` by a gain, give or take noise."""
    results = [result("base", accuracy=0.8, seed=seed, setting=setting) for seed in range(seeds)]
    for name, gain in gains.items():
        results += [
            result(name, accuracy=0.8 + gain + wobble * NOISE[seed], seed=seed, setting=setting,
                   keys={"strategy.name": "fedavg"})
            for seed in range(seeds)
        ]  # fmt: skip
    return summarise(results)


def only(found: list[Comparison]) -> Comparison:
    (comparison,) = found
    return comparison


def test_interval_and_wins_of_paired_differences() -> None:
    found = only(compare(rows({"new": 0.01}), "new:base"))
    mine, theirs = [0.81 + n for n in NOISE], [0.8] * 10
    expected = ttest_rel(mine, theirs).confidence_interval(0.95)
    assert (found.mean.low, found.mean.high) == pytest.approx((expected.low, expected.high))
    assert found.wins == 10
    assert found.verdict == "better"
    assert only(compare(rows({"new": 0.01}), "base:new")).verdict == "worse"


def test_models_that_clients_keep_are_compared_on_the_same_examples() -> None:
    """FedSA's accuracy is of three of four clients; FedAvg's of all test examples."""
    results = []
    for seed in range(10):
        move = NOISE[seed]
        shared = {"0": 0.9, "1": 0.8, "2": 0.7, "3": 0.1}
        own = {"0": 0.91 + move, "1": 0.82, "2": 0.73}
        results += [
            result("fedavg", accuracy=0.625, seed=seed, outcome={"accuracy_by_client": shared}),
            result("fedsa", accuracy=0.82 + move / 3, seed=seed, outcome={"accuracy_by_client": own}),
        ]
    found = only(compare(summarise(results), "fedsa:fedavg"))
    assert found.by_client
    assert found.differences == pytest.approx([0.02 + n / 3 for n in NOISE])
    assert "fedsa against fedavg: client by client" in claims([found])
    assert not only(compare(rows({"new": 0.01}), "new:base")).by_client


def test_where_all_clients_measure_on_all_test_examples_scores_are_compared() -> None:
    """Without domains a global model has no accuracies by client, a kept one has."""
    results = []
    for seed in range(10):
        own = {"0": 0.9, "1": 0.7}
        results += [
            result("fedavg", accuracy=0.75, seed=seed),
            result("fedsa", accuracy=0.8 + NOISE[seed], seed=seed, outcome={"accuracy_by_client": own}),
        ]
    found = only(compare(summarise(results), "fedsa:fedavg"))
    assert found.differences == pytest.approx([0.05 + n for n in NOISE])
    assert not found.by_client


def test_methods_that_share_no_seed_are_not_compared() -> None:
    """As after failures: one method has seed 0 alone, the other seed 1."""
    found = summarise([result("base", seed=0), result("new", seed=1, keys={"strategy.name": "fedavg"})])
    assert compare(found, "new:base") == []


def test_a_method_without_any_result_is_no_typing_error() -> None:
    assert compare(rows({"new": 0.01}), "absent:base, new:base", ["absent"])[0].method == "new"
    with pytest.raises(ConfigError, match="absent"):
        compare(rows({"new": 0.01}), "absent:base")


def test_both_questions_are_corrected_by_the_pairs_that_are_left_and_never_decrease() -> None:
    found = compare(rows({"a": 0.01, "b": 0.001, "c": 0.0}), "*:base")
    hypotheses = sorted(
        (p, place, key)
        for place, c in enumerate(found)
        for key, p in (("p_holm", c.p_value), ("p_alike_holm", c.p_alike))
    )
    wanted, least = dict[tuple[int, str], float](), 0.0
    for p, place, key in hypotheses:
        open_pairs = 3 - sum({(i, "p_holm"), (i, "p_alike_holm")} <= set(wanted) for i in range(3))
        least = max(least, min(1.0, open_pairs * p))
        wanted[place, key] = least
    got = {(i, key): getattr(c, key) for i, c in enumerate(found) for key in ("p_holm", "p_alike_holm")}
    assert got == pytest.approx(wanted)
    assert got[0, "p_holm"] == pytest.approx(3 * 2 / 1024)


def test_alike_is_two_one_sided_t_tests() -> None:
    found = only(compare(rows({"new": 0.002}), "new:base"))
    above = ttest_1samp(found.differences, -0.01, alternative="greater").pvalue
    below = ttest_1samp(found.differences, 0.01, alternative="less").pvalue
    assert found.p_alike == pytest.approx(max(above, below))


def test_one_study_in_twenty_is_wrong_where_every_pair_has_one_true_null_hypothesis() -> None:
    """Half the pairs are equal, half a point apart: the worst case for both questions together."""
    import numpy as np

    rng, wrong, studies = np.random.default_rng(4), 0, 300
    for _ in range(studies):
        family = []
        for true in (0.0, 0.0, 0.01, 0.01):
            drawn = tuple(rng.normal(true, 0.004, 10).tolist())
            family.append(
                Comparison(method="a", baseline="b", setting="", differences=drawn, p_alike=_p_alike(drawn),
                           mean=over_seeds(drawn, low=-1.0), p_value=sign_flip(drawn))
            )  # fmt: skip
        verdicts = [c.verdict for c in holm(family)]
        wrong += any(v in ("better", "worse") for v in verdicts[:2]) or "alike" in verdicts[2:]
    assert wrong / studies <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / studies)


def test_the_family_spans_all_settings() -> None:
    found = compare([*rows({"a": 0.01}, setting="one"), *rows({"a": 0.01}, setting="two")], "a:base")
    assert [c.setting for c in found] == ["one", "two"]
    assert [c.p_holm for c in found] == pytest.approx([2 * 2 / 1024] * 2)


@pytest.mark.parametrize(
    ("gain", "seeds", "wobble", "verdict"),
    [
        (0.01, 10, 1.0, "better"),
        (0.01, 9, 1.0, "undecided"),
        (0.0, 10, 1.0, "alike"),
        (0.0, 9, 1.0, "undecided"),
        (0.0, 10, 10.0, "undecided"),
        (0.05, 1, 1.0, "undecided"),
    ],
)
def test_what_may_be_said(gain: float, seeds: int, wobble: float, verdict: str) -> None:
    assert only(compare(rows({"new": gain}, seeds, wobble=wobble), "new:base")).verdict == verdict


def test_seeds_that_only_one_has_do_not_count() -> None:
    both = [*rows({"new": 0.01}, 4)[:1], *rows({"new": 0.01}, 3)[1:]]
    assert len(only(compare(both, "new:base")).differences) == 3


@pytest.mark.parametrize("pairs", ["new", "new:other", "*:other", ":base", "new:"])
def test_a_pair_of_names_that_were_not_run_is_refused(pairs: str) -> None:
    with pytest.raises(ConfigError, match=r"study\.comparisons = .*must be METHOD:BASELINE out of base, new"):
        declared(pairs, ["base", "new"])


def test_few_claims_are_spelt_out_and_many_counted() -> None:
    gains = {"a": 0.02, "b": 0.02, "c": 0.02, "d": -0.02}
    assert claims(compare(rows({"a": 0.02}), "a:base")) == (
        "Declared comparisons: 1, decided: 1 (a against base: better, +2.0 points)."
    )
    gains["e"] = 0.02
    assert claims(compare(rows(gains), "*:base")) == (
        "Declared comparisons: 5, decided: 5 (4 better and 1 worse)."
    )
    assert "a claim wants 10 seeds, there are 9" in claims(compare(rows(gains, 9), "*:base"))

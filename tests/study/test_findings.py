"""The sentences of the first screen, against studies whose answer is known."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fedlora.study.analyse.summary import summarise
from fedlora.study.report.findings import Findings, find
from tests.study.made_up import result, study


def found(*results: Any) -> Findings:
    return find(summarise(results))


def text(html: Any) -> str:
    return re.sub(r"<[^>]+>", "", str(html)).replace("\N{NO-BREAK SPACE}", " ")


def test_the_best_strategy_is_named_with_its_interval() -> None:
    findings = found(*study())
    assert text(findings.headline) == (
        "lora-fair is the most accurate strategy without differential privacy: "
        "82.9% of 2,400 test examples (95% interval 81.4 to 84.4%)."
    )
    assert "beats head-only (78.1%), which trains the head alone, by at least 2 points: +4.8 points" in text(
        findings.verdict
    )
    assert "centralised" not in findings.headline
    everybody, alone = text(findings.scale).split(" and ")
    assert everybody == "For scale: one client with everybody\u2019s data reaches 84.6%"
    assert alone == "a client on its own reaches 72.0% on average."


def test_each_strategy_that_falls_short_is_named_with_the_reason() -> None:
    ffa, fedsvd = map(text, found(*study()).failing)
    assert ffa == "ffa (79.3%) does not beat head-only (78.1%) by 2 points: +1.2 points."
    assert fedsvd.startswith(
        "fedsvd (51.5%) does not get past the majority baseline of 52.9% and does not beat"
    )


def test_a_best_strategy_that_fails_is_not_called_better() -> None:
    findings = found(result("flora", accuracy=0.79), result("head-only", accuracy=0.78))
    assert "does not beat head-only (78.0%)" in text(findings.verdict)
    assert len(findings.failing) == 1


def test_the_control_itself_can_stay_under_the_majority() -> None:
    findings = found(result("flora", accuracy=0.8), result("head-only", accuracy=0.5))
    assert [text(s).split(" (")[0] for s in findings.failing] == ["head-only"]


def test_without_the_control_nothing_is_claimed_about_it() -> None:
    findings = found(result("flora"))
    assert "head-only was not run" in text(findings.verdict)
    assert not findings.failing


def test_what_holds_for_several_settings_in_the_same_words_is_said_once() -> None:
    settings = ("many", "few")
    findings = found(
        *(result(name, setting=s, accuracy=0.8) for name in ("fedavg", "flora") for s in settings)
    )
    assert text(findings.verdict).count("head-only was not run") == 1


def test_strategies_too_close_to_tell_are_named() -> None:
    assert found(*study()).rivals == "This study does not tell lora-fair apart from fedavg (81.7%)."
    assert not found(result("flora", accuracy=0.8), result("ffa", accuracy=0.7)).rivals


@pytest.mark.parametrize(
    ("accuracy", "said"), [(0.738, "72.9%; this run is 0.9 points above"), (0.701, "2.8 points below")]
)
def test_private_runs_stand_beside_the_private_control(accuracy: float, said: str) -> None:
    keys = {"strategy.name": "head-only"}
    control = result("control", "variant", accuracy=0.729, epsilon=7.9, keys=keys)
    private = result("mine", "variant", accuracy=accuracy, epsilon=7.94)
    sentence = text(found(result("flora"), control, private).private[1])
    assert "at epsilon 7.94, delta 10\u207b\u2075." in sentence
    assert said in sentence


@pytest.mark.parametrize(
    "other",
    [
        {"epsilon": 3.0},
        {"epsilon": 7.94, "keys": {"strategy.name": "head-only", "privacy.target-delta": 1e-6}},
        {"keys": {"strategy.name": "head-only"}},
    ],
    ids=["another epsilon", "another delta", "not private"],
)
def test_no_control_of_another_privacy_is_used(other: dict[str, Any]) -> None:
    control = result("control", "variant", **{"keys": {"strategy.name": "head-only"}, **other})
    private = result("mine", "variant", epsilon=7.94)
    assert any("No private head-only has the same epsilon" in s for s in found(control, private).private)


def test_a_private_strategy_is_never_the_headline() -> None:
    findings = found(result("flora", accuracy=0.99, epsilon=8.0), result("ffa", accuracy=0.8))
    assert text(findings.headline).startswith("ffa is")
    assert "No LoRA strategy was run" in found(result("flora", epsilon=8.0)).headline


def test_one_seed_is_called_one_seed_and_several_are_averaged() -> None:
    assert "One seed: differences under 2.2 points mean nothing." in found(*study()).caveats[0]
    several = found(*study((0, 1, 2)))
    assert "3 seeds" in several.caveats[0]
    assert "test examples, mean of 3 seeds (95% interval" in several.headline
    assert "paired over the seeds" in several.verdict


def test_several_budgets_have_one_sentence_each_with_the_paired_difference() -> None:
    runs = [
        result(name, seed=seed, setting=f"eps-{budget:g}", epsilon=budget, accuracy=accuracy + 0.01 * seed,
               keys={"privacy.target-epsilon": budget})
        for seed in (1, 2)
        for budget, name, accuracy in (
            (3.0, "fedavg", 0.70), (3.0, "ffa", 0.72), (3.0, "head-only", 0.71),
            (1.0, "fedavg", 0.60), (1.0, "ffa", 0.50),
        )
    ]  # fmt: skip
    first, second = find(summarise(runs)).private
    assert "At epsilon 1, " in first
    assert "<strong>fedavg-eps-1</strong> is the most accurate adapter, 61.5%" in first
    assert "No private head-only" in first
    assert "<strong>ffa-eps-3</strong> is the most accurate adapter, 73.5%" in second
    assert "Private head-only: 72.5%; the difference is +1.0" in second
    assert "paired over the seeds" in second


def test_no_setting_is_judged_by_the_control_of_another() -> None:
    """In a, the adapter wins clearly; in b it loses to its own control, and would beat that of a."""
    accuracies = {
        ("fedavg", "a"): 0.70,
        ("head-only", "a"): 0.60,
        ("fedavg", "b"): 0.80,
        ("head-only", "b"): 0.85,
    }
    runs = [
        *(result(name, setting=setting, accuracy=value) for (name, setting), value in accuracies.items()),
        result("centralised", "reference", setting="a", accuracy=0.9),
        result("centralised", "reference", setting="b", accuracy=0.91),
    ]
    findings = find(summarise(runs))
    assert "<strong>fedavg-a</strong> is the most accurate" in findings.headline
    assert "<strong>fedavg-b</strong> is the most accurate" in findings.headline
    assert "<strong>fedavg-a</strong> beats head-only-a (60.0%)" in findings.verdict
    assert "<strong>fedavg-b</strong> does not beat head-only-b (85.0%)" in findings.verdict
    (failing,) = findings.failing
    assert "<strong>fedavg-b</strong>" in failing
    assert "reaches 90.0% (a) and" in findings.scale
    assert findings.rivals == ""

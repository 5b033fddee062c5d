"""The sentences of the first screen, against studies whose answer is known."""

from __future__ import annotations

from typing import Any

from fedlora.study.analyse.summary import summarise
from fedlora.study.report.findings import Findings, find
from tests.study.made_up import result, study


def found(*results: Any) -> Findings:
    return find(summarise(results))


def said(*results: Any) -> str:
    findings = found(*results)
    return " ".join((findings.headline, *findings.lines, *findings.caveats))


def test_nobody_is_crowned_where_the_highest_are_not_told_apart() -> None:
    findings = found(*study())
    assert findings.headline == (
        "Without privacy: No run is the most accurate for certain: lora-fair (82.9%), fedavg (81.7%) and "
        "flora (80.3%) are not told apart; 3 are behind."
    )
    assert findings.lines == (
        "Example-level epsilon 7.94, delta 10\u207b\u2075: Nothing is told apart: ffa-private (73.8%), "
        "head-only-private (72.9%) and fedavg-private (70.1%).",
        "Without privacy, over head-only (78.1%), the head alone: open for lora-fair (82.9%), fedavg "
        "(81.7%), flora (80.3%) and ffa (79.3%); less than 2 points for fedsvd (51.5%).",
        "Example-level epsilon 7.94, delta 10\u207b\u2075, over head-only-private (72.9%), the head alone: "
        "open for ffa-private (73.8%); less than 2 points for fedavg-private (70.1%).",
        "Not past the majority baseline (52.9%): fedsvd (51.5%).",
    )


def test_the_most_accurate_is_named_with_its_interval_where_all_others_are_behind() -> None:
    assert found(result("flora", accuracy=0.8), result("ffa", accuracy=0.7)).headline == (
        "flora is the most accurate: 80.0% of 2,400 test examples, 95% interval 78.4 to 81.6%."
    )


def test_a_variant_or_own_method_is_crowned_as_well_as_a_strategy() -> None:
    own = result("mine", "variant", accuracy=0.871, keys={"strategy.name": "own:Rule"})
    assert found(result("zero-padding", accuracy=0.802), own).headline.startswith("mine is the most accurate")
    assert found(own).headline == "mine: 87.1% of 2,400 test examples, 95% interval 85.7 to 88.4%."


def test_nothing_told_apart_is_said_first() -> None:
    findings = found(result("flora", accuracy=0.8), result("ffa", accuracy=0.795))
    assert findings.headline == "Nothing is told apart: flora (80.0%) and ffa (79.5%)."
    assert "most accurate" not in said(result("flora", accuracy=0.8), result("ffa", accuracy=0.795))
    two = result("flora", accuracy=0.8), result("ffa", accuracy=0.795)
    assert "of their difference leaves out 0, on this test set." in said(*two)
    three = *two, result("fedavg", accuracy=0.79)
    assert "leaves out 0; those of all 3 pairs hold together (Bonferroni), on this" in said(*three)


def test_the_head_alone_can_be_the_highest() -> None:
    findings = found(result("flora", accuracy=0.7), result("head-only", accuracy=0.8))
    assert findings.headline.startswith("head-only is the most accurate")
    assert findings.lines == (
        "Over head-only (80.0%), the head alone: less than 2 points for flora (70.0%).",
    )
    gain = found(result("flora", accuracy=0.9), result("head-only", accuracy=0.8)).lines
    assert gain == ("Over head-only (80.0%), the head alone: at least 2 points for flora (90.0%).",)


def test_without_the_control_nothing_is_claimed_about_it() -> None:
    assert said(result("flora"), result("ffa")).count("head-only") == 1
    assert "head-only was not run" in said(result("flora"), result("ffa"))
    assert "head-only was not run" not in said(*study())


def test_only_references_have_no_contest() -> None:
    assert found(result("centralised", "reference")).headline == "Only references were run."


def test_one_seed_is_called_one_seed_and_several_are_averaged() -> None:
    assert found(*study()).caveats[0].startswith("One seed:")
    assert found(*study((0, 1, 2))).caveats[0].startswith("3 seeds: means")
    both = found(result("flora", seed=0), result("flora", seed=1), result("ffa"))
    assert both.caveats[0].startswith("1 or 2 seeds")


def test_no_setting_is_judged_by_the_control_of_another() -> None:
    """In a, the adapter wins clearly; in b it loses to its own control, and would beat that of a."""
    accuracies = {
        ("fedavg", "a"): 0.70,
        ("head-only", "a"): 0.60,
        ("fedavg", "b"): 0.80,
        ("head-only", "b"): 0.85,
    }
    runs = [result(name, setting=setting, accuracy=value) for (name, setting), value in accuracies.items()]
    findings = found(*runs, result("centralised", "reference", setting="a", accuracy=0.9))
    assert findings.headline == "A run is told apart as the most accurate in 2 of 2 settings."
    assert findings.lines == (
        "a: fedavg-a is the most accurate: 70.0% of 2,400 test examples, 95% interval 68.1 to 71.8%.",
        "b: head-only-b is the most accurate: 85.0% of 2,400 test examples, 95% interval 83.5 to 86.4%.",
        "a, over head-only-a (60.0%), the head alone: at least 2 points for fedavg-a (70.0%).",
        "b, over head-only-b (85.0%), the head alone: less than 2 points for fedavg-b (80.0%).",
    )


def test_a_private_strategy_is_no_rival_of_one_without() -> None:
    findings = found(result("flora", accuracy=0.99, epsilon=8.0), result("ffa", accuracy=0.8))
    assert findings.headline.startswith("Without privacy: ffa: 80.0%")
    assert findings.lines[0].startswith("Example-level epsilon 8.00, delta 10\u207b\u2075: flora: 99.0%")
    assert "Epsilons are example-level, per client" in said(result("flora", epsilon=8.0))

"""The report's charts: their numbers, colours and what they leave out."""

from __future__ import annotations

import math
from dataclasses import replace

from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import summarise
from fedlora.study.report.charts import draw_charts
from fedlora.study.report.styles import styles_of
from fedlora.study.report.timeline_chart import spells
from tests.study.made_up import result


def test_what_an_attacker_can_find_is_drawn_by_the_claim_of_each_run() -> None:
    claim = {"epsilon": 7.94, "delta": 1e-5, "history": [[1.0, 0.05, 600]]}
    client_level = {"epsilon": 5.0, "delta": 1e-5, "history": [[5.0, 1.0, 25]], "granularity": "client"}
    runs = [
        result("fedavg", epsilon=7.94, outcome={"claim": claim}),
        result("ffa", epsilon=7.94),
        result("flora", epsilon=5.0, keys={"privacy.mode": "client"}, outcome={"claim": client_level}),
        result("fedex"),
    ]
    chart = next(c for c in draw_charts(summarise(runs)) if c.name == "trade-off")
    assert chart.numbers is not None
    lines = {line[0]: line[1:] for line in chart.numbers.body}
    assert lines == {
        "fedavg": ("6.8%", "22.2%", "59.3%", "the privacy loss distribution"),
        "ffa": ("100.0%", "100.0%", "100.0%", "epsilon and delta alone"),
        "flora": ("1.9%", "9.3%", "39.0%", "the privacy loss distribution"),
    }
    assert "at 1% false alarms an attacker finds at most 22.2% (fedavg)" in chart.note
    assert "Of ffa only epsilon and delta are known" in chart.note
    assert "fedavg, at 10% false alarms an attacker finds at most 59.3%" in chart.svg


def test_traffic_adds_up_to_what_the_run_sent() -> None:
    run = result("flora")
    chart = next(chart for chart in draw_charts(summarise([run])) if chart.name == "traffic")
    assert chart.numbers is not None
    assert chart.numbers.body[-1] == ("10", "58.9 MB")
    assert run.result["bytes_up"] + run.result["bytes_down"] == 58_900_000


def test_dollar_signs_are_text_in_charts() -> None:
    run = result("flora", outcome={"accuracy_by_domain": {"a $x_1$ b": 0.8}})
    assert ">a $x_1$ b</text>" in draw_charts(summarise([run]))[-1].svg


def test_a_private_run_has_the_colour_of_its_strategy_and_another_variant_has_not() -> None:
    named = {"strategy.name": "flora"}
    rows = summarise(
        [result("flora"), result("p", "variant", epsilon=8.0, keys=named), result("v", "variant", keys=named)]
    )
    styles = styles_of(rows)
    assert styles["flora"].colour == styles["p"].colour != styles["v"].colour
    assert (styles["flora"].hollow, styles["p"].hollow) == (False, True)
    assert len({style.marker for style in styles.values()}) == 3


def test_sparse_evaluation_is_shown_at_its_rounds() -> None:
    run = result("flora")
    for record in run.rounds:
        if record["round"] % 5:
            record["accuracy"] = None
    chart = draw_charts(summarise([run]))[0]
    assert chart.numbers is not None
    assert [line[0] for line in chart.numbers.body] == ["5", "10"]


def frontier(name: str, losses: dict[float, float]) -> list[CellResult]:
    """A method at several budgets and two seeds; each loses something of 80 % there."""
    return [
        result(name, seed=seed, setting=f"eps-{budget:g}", accuracy=0.8 - loss + 0.01 * seed,
               epsilon=None if math.isinf(budget) else budget,
               keys={} if math.isinf(budget) else {"privacy.target-epsilon": budget})
        for seed in (1, 2) for budget, loss in losses.items()
    ]  # fmt: skip


def test_privacy_utility_has_each_method_at_each_budget_and_one_colour_for_it() -> None:
    runs = [*frontier("fedavg", {1.0: 0.2, 3.0: 0.1, math.inf: 0.0}), *frontier("ffa", {3.0: 0.05})]
    rows = summarise(runs)
    styles = styles_of(rows)
    assert len({styles[r.name].colour for r in rows if r.method == "fedavg"}) == 1
    assert styles["fedavg-eps-3"].marker == styles["ffa-eps-3"].marker != styles["fedavg-eps-1"].marker
    chart = next(chart for chart in draw_charts(rows) if chart.name == "privacy-utility")
    assert chart.numbers is not None
    assert chart.numbers.header == ("method", "epsilon 1", "epsilon 3", "epsilon \N{INFINITY}")
    (line,) = chart.numbers.body
    assert [value.split()[0] for value in line] == ["fedavg", "61.5%", "71.5%", "81.5%"]
    assert "fedavg, epsilon 3: 71.5% (65.1 to 77.9%)" in chart.svg


def test_one_budget_has_no_privacy_utility_chart() -> None:
    rows = summarise([result("fedavg", epsilon=3.0), result("flora")])
    assert "privacy-utility" not in [chart.name for chart in draw_charts(rows)]


def test_a_timeline_shows_who_was_at_work_when() -> None:
    run = result("fedavg")
    records = [
        {
            **run.rounds[0],
            "round": 1,
            "virtual_seconds": 90.0,
            "orders": {"0": 0.0, "7": 0.0},
            "arrivals": {"0": 30.0},
        },
        {
            **run.rounds[0],
            "round": 2,
            "virtual_seconds": 7290.0,
            "orders": {"7": 90.0},
            "arrivals": {"7": 7290.0},
        },
    ]
    assert spells(records) == [(0, 0.0, 30.0, True), (7, 0.0, 90.0, False), (7, 90.0, 7290.0, True)]
    rows = summarise([replace(run, rounds=records), result("flora")])
    (chart,) = [chart for chart in draw_charts(rows) if chart.name == "timeline"]
    assert "fedavg, client 0: 0.0 s to 30.0 s" in chart.svg
    assert "fedavg, client 7: 1 min 30 s to 2 h 1 min" in chart.svg
    assert chart.numbers is not None
    assert chart.numbers.body == (("fedavg", "1 min 30 s", "2 h 1 min", "", "", ""),)
    assert "timeline" not in [chart.name for chart in draw_charts(summarise([result("flora")]))]

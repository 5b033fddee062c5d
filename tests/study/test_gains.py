"""Gains of clients over a global model, and over what they reach alone."""

from __future__ import annotations

import pytest

from fedlora.study.analyse.gains import gains
from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import summarise
from fedlora.study.report.charts import draw_charts
from fedlora.study.report.report import render
from tests.study.made_up import result


def clients(*accuracies: float) -> dict[str, float]:
    return {str(k): value for k, value in enumerate(accuracies)}


def second(own: dict[str, float], beside: dict[str, float]) -> dict[str, object]:
    return {"personal": {"accuracy_by_client": own, "accuracy_of_global_by_client": beside}}


def study() -> list[CellResult]:
    """Two seeds of a global model, one with second adapters, FedSA, a local head, and clients alone."""
    runs = []
    for seed in (1, 2):
        move = 0.1 * (seed - 1)
        named: dict[str, tuple[str, dict[str, object], dict[str, object]]] = {
            "fedavg": ("fedavg", {}, {"accuracy_by_client": clients(0.5 + move, 0.6)}),
            "dual": (
                "flora",
                {"lora.personal-rank": 2},
                {
                    "accuracy_by_client": clients(0.4, 0.4),
                    **second(clients(0.7 + move, 0.6), clients(0.4, 0.4)),
                },
            ),
            "fedsa": ("fedsa", {}, {"accuracy_by_client": clients(0.8, 0.5)}),
            "own-head": ("fedavg", {"model.head": "local"}, {"accuracy_by_client": clients(0.6, 0.6)}),
        }
        runs += [
            result(name, accuracy=0.6, seed=seed, outcome=outcome, keys={"strategy.name": strategy, **keys})  # type: ignore[dict-item]
            for name, (strategy, keys, outcome) in named.items()
        ]
        alone = {"strategy.name": "local-only", "model.head": "local"}
        runs.append(
            result("local-only", "reference", accuracy=0.5, seed=seed, keys=alone,
                   outcome={"accuracy_by_client": clients(0.3, 0.7)})
        )  # fmt: skip
    return runs


def found(runs: list[CellResult]) -> dict[tuple[str, str], dict[str, float]]:
    return {(one.name, one.over): one.by_client for one in gains(summarise(runs))}


def test_gains_are_seed_by_seed_and_client_by_client() -> None:
    """A run's own global model comes first; without one it is fedavg's, not that of a local head."""
    by = found(study())
    assert by["dual", "global"] == pytest.approx(clients(0.35, 0.2))
    assert by["dual", "alone"] == pytest.approx(clients(0.45, -0.1))
    assert by["fedsa", "global"] == pytest.approx(clients(0.25, -0.1))
    assert by["own-head", "global"] == pytest.approx(clients(0.05, 0.0))
    assert by["fedavg", "alone"] == pytest.approx(clients(0.25, -0.1))
    assert ("fedavg", "global") not in by
    assert not any(name == "local-only" for name, _ in by)
    worst = {one.name: one.worst_decile for one in gains(summarise(study())) if one.over == "global"}
    assert worst["fedsa"] == pytest.approx(-0.1)


def test_what_is_missing_is_not_held_against() -> None:
    runs = [run for run in study() if run.group in ("fedsa", "dual")]
    assert set(found(runs)) == {("dual", "global")}
    other = [run for run in study() if run.group == "fedsa"]
    other += [result("fedavg", setting="other", outcome={"accuracy_by_client": clients(0.1, 0.1)}, seed=1)]
    assert found(other) == {}


def test_the_report_has_a_column_and_a_picture() -> None:
    page = render("x", study())
    assert "Clients&#39; gain over global" in page
    assert "worst decile" in page
    chart = next(c for c in draw_charts(summarise(study())) if c.name == "gains")
    assert chart.numbers is not None
    assert chart.numbers.body[0] == (
        "fedavg",
        "alone",
        "+7.5",
        "\N{MINUS SIGN}10.0",
        "\N{MINUS SIGN}10.0",
        "+25.0",
        "1 of 2",
    )
    many = result("fedsa", outcome={"accuracy_by_client": clients(*[k / 200 for k in range(200)])})
    alone = result("local-only", "reference", keys={"strategy.name": "local-only", "model.head": "local"},
                   outcome={"accuracy_by_client": clients(*[0.5] * 200)})  # fmt: skip
    chart = next(c for c in draw_charts(summarise([many, alone])) if c.name == "gains")
    assert str(chart.svg).count("fedsa, over alone: ") == 50
    assert chart.numbers is not None
    assert chart.numbers.body[0][-1] == "99 of 200"

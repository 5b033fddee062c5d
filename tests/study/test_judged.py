"""Studies judged by an error or by F1: what is better, what is told apart, and which rate is chosen."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.config import RunConfig, from_flat
from fedlora.errors import ConfigError, NotApplicable, RunFailed
from fedlora.study.analyse.comparisons import compare
from fedlora.study.analyse.contests import Contest, contests, difference
from fedlora.study.analyse.results import CellResult
from fedlora.study.analyse.summary import summarise
from fedlora.study.analyse.table import StudyTable
from fedlora.study.execute.runner import run_study
from fedlora.study.plan.cells import expand
from fedlora.study.plan.judged import check_cell, judged_by
from fedlora.study.report.findings import find
from fedlora.study.report.report import render
from fedlora.tasks.metrics import METRICS
from fedlora.tasks.targets import MultiLabelClassification, Regression
from tests.study.made_up import result
from tests.study.simulation import KEYS, Simulation

SPREAD = 2.0


def regression(name: str, rmse: float, seed: int = 0, error: float | None = None, **keys: Any) -> CellResult:
    """A run whose test targets have a spread of 2."""
    measured = {
        "accuracy": None, "accuracy_by_domain": {}, "rmse": rmse, "mae": 0.8 * rmse,
        "r2": 1 - (rmse / SPREAD) ** 2, "rmse_by_domain": {"a": rmse, "b": 2 * rmse},
    }  # fmt: skip
    baseline = {"majority_accuracy": None, "mean_rmse": SPREAD, "mean_mae": 1.6, "mean_r2": 0.0}
    errors = {} if error is None else {"standard_errors": {"rmse": error}}
    return result(
        name, seed=seed, keys={"task": "regression", **keys}, record=measured,
        outcome={**measured, **baseline, **errors, "labels": ["score"]}, label=f"{name}-seed-{seed}",
    )  # fmt: skip


def ten(name: str, rmse: float) -> list[CellResult]:
    return [regression(name, rmse + 0.002 * (seed % 3), seed) for seed in range(10)]


def only(results: list[CellResult], metric: str = "") -> Contest:
    (contest,) = contests(summarise(results, metric))
    return contest


def test_the_run_with_the_least_error_is_the_best() -> None:
    study = [*ten("fedavg", 1.0), *ten("flora", 0.8), *ten("head-only", 1.1)]
    assert [row.name for row in only(study).rows] == ["flora", "fedavg", "head-only"]
    assert [row.name for row in only(study, "mae").rows] == ["flora", "fedavg", "head-only"]
    assert [row.name for row in only(study, "r2").rows] == ["flora", "fedavg", "head-only"]
    found = find(summarise(study))
    assert found.headline.startswith("flora has the lowest RMSE: 0.8018 on 2,400 test examples, 95% interval")
    assert (
        "Against head-only (1.102), the head alone: at least 0.04 less for flora (0.8018) and fedavg"
        in (found.lines[0])
    )
    assert any("Runs are judged by RMSE, of which less is better" in caveat for caveat in found.caveats)
    assert find(summarise(study, "r2")).headline.startswith("flora has the highest R2")


def test_an_adapter_is_worth_hundredths_of_the_spread_of_the_targets() -> None:
    contest = only([*ten("fedavg", 1.0), *ten("flora", 1.03), *ten("fedsvd", 1.2), *ten("head-only", 1.05)])
    gains = {row.name: contest.gain(row) for row in contest.rows}
    assert gains == {"fedavg": "enough", "flora": "too little", "head-only": None, "fedsvd": "too little"}


def test_runs_that_are_no_better_than_the_mean_are_named() -> None:
    found = find(summarise([*ten("fedavg", 1.99), *ten("flora", 2.5)]))
    assert found.lines[-1] == "Not past the mean of the test targets (2): flora (2.502)."


def test_a_claim_of_less_error_is_better_and_alike_is_by_the_spread() -> None:
    study = [*ten("flora", 0.8), *ten("fedavg", 1.0), *ten("fedsvd", 0.815)]
    found = {(c.method, c.baseline): c for c in compare(summarise(study), "*:fedavg, flora:fedsvd")}
    won, lost = found["flora", "fedavg"], compare(summarise(study), "fedavg:flora")[0]
    assert (won.verdict, won.wins, lost.verdict, lost.wins) == ("better", 10, "worse", 0)
    sides = [regression("flora", 1.0 + 0.02 * (-1) ** s, s) for s in range(10)]
    (narrow,) = compare(
        summarise([*sides, *(regression("fedavg", 1.0, s) for s in range(10))]), "flora:fedavg"
    )
    assert narrow.verdict == "alike", (
        "within 0.02, one hundredth of the spread; within 0.01 it is not certain"
    )


def test_one_seed_has_the_interval_of_its_standard_error() -> None:
    row, other = summarise([regression("flora", 0.8, error=0.03), regression("fedavg", 1.0, error=0.04)])
    assert (row.score.low, row.score.high) == pytest.approx((0.8 - 1.959964 * 0.03, 0.8 + 1.959964 * 0.03))
    found = difference(row, other)
    half = 1.959964 * math.hypot(0.03, 0.04)
    assert (found.low, found.high) == pytest.approx((-0.2 - half, -0.2 + half))
    assert find([row, other]).headline.startswith("flora has the lowest RMSE: 0.8 on 2,400 test examples")


def test_one_seed_without_a_standard_error_crowns_nobody() -> None:
    rows = summarise([regression("flora", 0.1), regression("fedavg", 1.0), regression("head-only", 1.5)])
    assert rows[0].score.low is None
    found = find(rows)
    assert found.headline.startswith("Nothing is told apart: flora (0.1), fedavg (1)")
    assert "open for flora" in found.lines[0]
    assert any("so that nothing is told apart" in caveat for caveat in found.caveats)


def test_the_page_of_an_error_says_so_and_sorts_the_least_first(tmp_path: Path) -> None:
    study = [*ten("flora", 0.8), *ten("fedavg", 1.0)]
    page = render("errors", study, compare(summarise(study), "flora:fedavg"))
    assert 'data-lower><button type="button">RMSE</button>' in page
    assert "To the lowest" in page
    assert "To the highest" not in page
    assert 'id="chart-rmse"' in page
    assert "RMSE for what was sent" in page
    assert "RMSE by domain" in page
    assert "Difference in RMSE" in page
    assert "flora against fedavg: better, RMSE \N{MINUS SIGN}0.2" in page
    assert "difference of 0.02." in page
    assert not re.search(r"\b[Aa]ccurac", page.partition("<main>")[2].partition('id="setting"')[0])


def test_f1_judges_many_labels_and_accuracy_does_where_asked() -> None:
    def labels(name: str, f1: float, accuracy: float) -> CellResult:
        figures = {"f1_micro": f1, "f1_macro": f1 / 2, "all_f1_micro": 0.3, "all_f1_macro": 0.2}
        return result(
            name, accuracy=accuracy, keys={"task": "multi-label-classification"},
            outcome={**figures, "standard_errors": {"f1_micro": 0.01}},
        )  # fmt: skip

    study = [labels("flora", 0.7, 0.90), labels("fedavg", 0.6, 0.95)]
    assert [row.name for row in only(study).rows] == ["flora", "fedavg"]
    assert [row.name for row in only(study, "accuracy").rows] == ["fedavg", "flora"]
    assert find(summarise(study)).headline.startswith("flora has the highest F1 (micro): 70.0% on 2,400")
    assert only(study).rows[0].reference == ("every label for each example", 0.3)


def test_runs_that_lack_the_metric_are_refused() -> None:
    with pytest.raises(RunFailed, match=r"^fedavg: f1_macro is missing in its result.json"):
        summarise([result("fedavg")], "f1_macro")


TASK = {
    **KEYS,
    "task": "regression",
    "data.name": "somebody/dataset",
    "data.partitioner": "iid",
    "data.num-partitions": 4,
}


@pytest.fixture
def errors(simulation: Simulation) -> Simulation:
    """The error falls with the distance of the rate from 0.01."""

    def outcome(config: RunConfig) -> dict[str, Any]:
        rmse = 0.5 + abs(math.log10(config.train.learning_rate / 0.01)) + 0.001 * config.seed
        rmse += 0.3 * (config.strategy.name == "flora")
        return regression("fedavg", rmse).result | {"strategy": config.strategy.name}

    simulation.outcome = outcome
    return simulation


def test_a_study_of_regressions_tunes_by_the_least_error(errors: Simulation, tmp_path: Path) -> None:
    keys = {
        **TASK, "study.strategies": "flora,fedavg", "study.seeds": "1,2", "data.validation-fraction": 0.1,
        "study.tune-learning-rates": "0.1,0.01,0.001", "study.tune-seeds": "101", "study.metric": "mae",
    }  # fmt: skip
    page = run_study(from_flat(keys), tmp_path).read_text()
    assert {errors.configs[f"{m}-seed-1"].train.learning_rate for m in ("flora", "fedavg")} == {0.01}
    record = json.loads((tmp_path / "study.json").read_text())["tuning"]["learning-rates"]["fedavg"]
    assert record["mae"]["0.01"] < min(record["mae"]["0.1"], record["mae"]["0.001"])
    assert "mean MAE (the lowest is best) on a validation part" in page
    assert "fedavg has the lowest MAE" in page
    table = StudyTable.read(tmp_path).ranked()
    assert [row.method for row in table.rows] == ["fedavg", "flora"]
    assert "| method | seeds | MAE | 95 % interval |" in table.markdown()
    assert "fedavg" in StudyTable.read(tmp_path).latex()
    assert list(table.frame()["mae"]) == [row.score.value for row in table.rows]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"study.metric": "accuracy"}, "study.metric = 'accuracy': task regression has rmse, mae, r2"),
        ({"study.target-accuracy": 0.5}, "study.target-accuracy = 0.5: is of accuracies, runs are"),
        (
            {"study.tune-epsilon": 1.0, "study.tune-learning-rates": "0.1"},
            "study.tune-epsilon = 1: is of accuracies, runs are judged by rmse; must be 0",
        ),
        (
            {"study.variants": '{"a": {"task": "classification"}}'},
            "study: runs are judged by different metrics, fedavg by rmse and a by accuracy",
        ),
    ],
)  # fmt: skip
def test_what_an_error_excludes_is_refused(keys: dict[str, Any], message: str) -> None:
    config = from_flat({**TASK, "study.strategies": "fedavg", **keys})
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        judged_by(config.study, expand(config, 4))


def test_clients_own_models_have_no_f1() -> None:
    config = from_flat({**TASK, "task": "multi-label-classification", "strategy.name": "local-only",
                        "model.head": "local"})  # fmt: skip
    with pytest.raises(NotApplicable, match=r"^study.metric = 'f1_micro': model.head"):
        check_cell(config.study, config)
    check_cell(from_flat({"study.metric": "accuracy"}).study, config)


def test_standard_errors_are_those_of_theory() -> None:
    rng = np.random.default_rng(0)
    y, noise = rng.normal(size=(400, 1)), rng.normal(scale=0.5, size=(400, 1))
    found, squared = Regression().standard_errors(y + noise, y), noise[:, 0] ** 2
    assert found["mae"] == pytest.approx(np.abs(noise).std() / 20, rel=0.2)
    assert found["rmse"] == pytest.approx(squared.std() / 20 / (2 * np.sqrt(squared.mean())), rel=0.2)
    assert found == Regression().standard_errors(y + noise, y)
    assert "pearson" not in Regression().standard_errors(np.zeros_like(y), y)
    has = (rng.random((400, 3)) < 0.3).astype(np.float32)
    assert (
        MultiLabelClassification().standard_errors(has - 0.5 + rng.normal(size=has.shape), has)["f1_micro"]
        > 0
    )


def test_every_metric_of_every_task_is_known() -> None:
    from fedlora.tasks import TASKS

    assert all(name in METRICS for task in TASKS.values() for name in task.metrics)

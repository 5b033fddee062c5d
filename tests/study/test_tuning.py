"""Learning rates that a study tunes: on what, which one is taken, and what then runs with it."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from fedlora.config import RunConfig, from_flat
from fedlora.errors import ConfigError, RunFailed
from fedlora.privacy.calibration import epsilon_spent
from fedlora.study.analyse.tuning import shown_score
from fedlora.study.execute.runner import run_study
from fedlora.tasks.metrics import ACCURACY
from tests.study.simulation import KEYS, Simulation

BEST = {"fedavg": 0.01, "flora": 0.03}


def near_its_best(config: RunConfig) -> float:
    """Each strategy has a rate of its own; validation is kinder than the test."""
    distance = abs(math.log(config.train.learning_rate / BEST[config.strategy.name]))
    return 0.7 - 0.05 * distance + (0.1 if config.data.validation_fraction else 0.0)


def tuned_study(**keys: Any) -> RunConfig:
    given = {
        "data.validation-fraction": 0.1,
        "study.strategies": "fedavg,flora",
        "study.seeds": "1,2",
        "study.tune-learning-rates": "0.03,0.003,0.01",
        "study.tune-seeds": "101,102",
    }
    return from_flat({**KEYS, **given, **keys})


@pytest.fixture
def tuning(simulation: Simulation) -> Simulation:
    simulation.accuracy = near_its_best
    return simulation


def test_each_method_runs_with_its_own_rate_on_all_training_examples(
    tuning: Simulation, tmp_path: Path
) -> None:
    report = run_study(tuned_study(), tmp_path)
    assert tuning.ran[:3] == [f"tuning-fedavg-rate-{rate}-seed-101" for rate in ("0.03", "0.003", "0.01")]
    assert len(tuning.ran) == 2 * 3 * 2 + 2 * 2
    for label, config in tuning.configs.items():
        trial = label.startswith("tuning-")
        assert config.data.validation_fraction == (0.1 if trial else 0.0)
        assert config.seed in ((101, 102) if trial else (1, 2))
        if not trial:
            assert config.train.learning_rate == BEST[config.strategy.name]
    record = json.loads((tmp_path / "study.json").read_text())["tuning"]
    assert (record["seeds"], record["validation-fraction"]) == ([101, 102], 0.1)
    assert {name: found["chosen"] for name, found in record["learning-rates"].items()} == BEST
    assert record["learning-rates"]["fedavg"]["accuracy"]["0.01"] == pytest.approx(0.8)
    page = report.read_text()
    assert (
        "a validation part, 10% of the training examples, held apart from those trials; seeds: 101 and 102."
        in page
    )
    assert "<td>0.03 (at the edge)</td>" in page
    assert "<td>80.0%</td><td>74.5%</td><td>0.01</td>" in page
    assert "tuning-" not in page, "trials are no results"


def test_trials_are_resumed_like_all_cells(tuning: Simulation, tmp_path: Path) -> None:
    tuning.fails["tuning-flora-rate-0.003-seed-102"] = KeyboardInterrupt()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        run_study(tuned_study(), tmp_path)
    before = list(tuning.ran)
    tuning.fails.clear()
    run_study(tuned_study(), tmp_path, resume=True)
    again = set(before) & set(tuning.ran[len(before) :])
    assert again == {"tuning-flora-rate-0.003-seed-102"}
    tuning.ran.clear()
    run_study(tuned_study(), tmp_path, resume=True)
    assert tuning.ran == []


def test_each_setting_and_variant_is_tuned_and_references_follow_fedavg(
    tuning: Simulation, tmp_path: Path
) -> None:
    keys = {
        "study.settings": '{"a": {}, "b": {"lora.rank": 4}}',
        "study.variants": '{"other": {"strategy.name": "flora", "lora.alpha": 8.0}}',
        "study.references": "centralised",
        "study.seeds": "1",
    }
    run_study(tuned_study(**keys), tmp_path)
    trials = [label for label in tuning.ran if label.startswith("tuning-")]
    assert len(trials) == 3 * 2 * 3 * 2
    rates = {k: c.train.learning_rate for k, c in tuning.configs.items() if not k.startswith("tuning-")}
    expected = {"fedavg": 0.01, "flora": 0.03, "centralised": 0.01, "other": 0.03}
    assert rates == {f"{method}-{setting}": rate for method, rate in expected.items() for setting in "ab"}


def test_a_rate_that_fails_is_not_chosen(tuning: Simulation, tmp_path: Path) -> None:
    tuning.fails["tuning-fedavg-rate-0.01-seed-102"] = RunFailed("nothing finite")
    report = run_study(tuned_study(**{"study.comparisons": "flora:fedavg"}), tmp_path)
    assert tuning.configs["fedavg-seed-1"].train.learning_rate == 0.03
    assert "<td>failed</td>" in report.read_text()


def test_a_method_that_fails_with_every_rate_is_no_result(tuning: Simulation, tmp_path: Path) -> None:
    for rate in ("0.03", "0.003", "0.01"):
        tuning.fails[f"tuning-fedavg-rate-{rate}-seed-101"] = RunFailed("nothing finite")
    with pytest.raises(RunFailed, match=r"2 of 4 runs failed .*its learning rate could not be tuned"):
        run_study(tuned_study(), tmp_path)
    assert "flora-seed-1" in tuning.ran
    assert "fedavg-seed-1" not in tuning.ran
    assert (
        json.loads((tmp_path / "study.json").read_text())["tuning"]["learning-rates"]["fedavg"]["chosen"]
        is None
    )


def test_equal_rates_give_the_smallest(simulation: Simulation, tmp_path: Path) -> None:
    run_study(tuned_study(), tmp_path)
    assert simulation.configs["flora-seed-1"].train.learning_rate == 0.003


def test_under_privacy_it_says_that_tuning_is_outside_epsilon(tuning: Simulation, tmp_path: Path) -> None:
    page = run_study(tuned_study(**{"privacy.mode": "example"}), tmp_path).read_text()
    assert "Tuning is outside epsilon." in page


HISTORY = [0.8, 0.02, 200]
PRIVATE = {"privacy.mode": "example", "study.strategies": "fedavg", "study.seeds": "1"}


@pytest.fixture
def spending(tuning: Simulation) -> Simulation:
    """Every run has an epsilon and keeps the history of its clients."""
    alone = epsilon_spent(0.8, 0.02, 200, 1e-5)
    tuning.outcome = lambda config: {"epsilon": alone, "histories": [[HISTORY]]}
    return tuning


def test_both_epsilons_are_reported_where_histories_are_kept(spending: Simulation, tmp_path: Path) -> None:
    page = run_study(tuned_study(**PRIVATE), tmp_path).read_text()
    alone, whole = (epsilon_spent(0.8, 0.02, 200 * runs, 1e-5) for runs in (1, 1 + 3 * 2))
    assert f"<td>{alone:.2f}</td><td>{whole:.2f}</td></tr>" in page
    assert "what the choice tells of the validation part is outside epsilon" in page
    assert "Tuning is outside epsilon." not in page


def test_without_the_history_of_a_trial_the_whole_is_not_known(spending: Simulation, tmp_path: Path) -> None:
    spending.fails["tuning-fedavg-rate-0.003-seed-101"] = RunFailed("nothing finite")
    page = run_study(tuned_study(**PRIVATE), tmp_path).read_text()
    assert f"<td>{epsilon_spent(0.8, 0.02, 200, 1e-5):.2f}</td><td>\N{EN DASH}</td></tr>" in page


def test_a_choice_with_noise_costs_a_validation_example_its_epsilon(
    spending: Simulation, tmp_path: Path
) -> None:
    config = tuned_study(**PRIVATE, **{"study.tune-epsilon": 5.0})
    page = run_study(config, tmp_path).read_text()
    assert f"<td>{epsilon_spent(0.8, 0.02, 200, 1e-5) + 5:.2f}</td></tr>" in page
    assert "Accuracies have noise: the choice is 5-DP for an example of the validation part" in page
    record = (tmp_path / "study.json").read_text()
    shown = json.loads(record)["tuning"]["learning-rates"]["fedavg"]["accuracy"]
    exact = {"0.003": 0.8 - 0.05 * math.log(10 / 3), "0.01": 0.8, "0.03": 0.8 - 0.05 * math.log(3)}
    assert shown == pytest.approx(exact, abs=0.01)
    assert shown != pytest.approx(exact, abs=0.5 / 2400), "rounding to whole hits is no noise"
    run_study(config, tmp_path, resume=True)
    again = json.loads((tmp_path / "study.json").read_text())["tuning"]["learning-rates"]["fedavg"][
        "accuracy"
    ]
    assert again == shown, "whoever reads it twice learns nothing more"


def test_the_noise_on_hits_has_its_law() -> None:
    from types import SimpleNamespace

    trials, epsilon, examples = 6, 2.0, 10_000
    result = {"accuracy": 0.5, "examples": examples}
    found = [
        round(
            examples
            * shown_score(
                SimpleNamespace(cell=SimpleNamespace(seed=seed, label="x")),  # type: ignore[arg-type]
                ACCURACY, result, epsilon, trials,
            )
        ) - examples // 2
        for seed in range(4000)
    ]  # fmt: skip
    ratio = math.exp(-epsilon / trials)
    law = {x: (1 - ratio) / (1 + ratio) * ratio ** abs(x) for x in range(-15, 16)}
    counts = Counter(found)
    kept = sum(counts[x] for x in law)
    expected = [kept * p / sum(law.values()) for p in law.values()]
    assert chisquare([counts[x] for x in law], expected).pvalue > 1e-6
    assert kept > 0.98 * len(found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"study.tune-seeds": "2,101"}, "study.tune-seeds = '2,101': seed 2 is reported on too"),
        ({"study.tune-seeds": ""}, "study.tune-seeds = ''"),
        ({"study.tune-epsilon": 1.0, "privacy.mode": "client"}, "study.tune-epsilon = 1: fedavg hides more"),
        (
            {"study.tune-epsilon": 1.0, "privacy.mode": "example", "privacy.unit-column": "author"},
            "study.tune-epsilon = 1: fedavg hides more than single examples",
        ),
        (
            {"study.tune-epsilon": 1.0, "study.tune-learning-rates": ""},
            "study.tune-epsilon = 1.0: takes study.tune-learning-rates",
        ),
        ({"study.tune-seeds": "101,101"}, "study.tune-seeds: a value is there more than once"),
        ({"data.validation-fraction": 0.0}, r"data.validation-fraction = 0.0: must be > 0"),
        ({"study.tune-learning-rates": "0.1,x"}, "'x' is no number > 0"),
        ({"study.tune-learning-rates": "0.1,-1"}, "'-1' is no number > 0"),
        ({"study.tune-learning-rates": "0.1,1e-1"}, "study.tune-learning-rates: a value is there more"),
        (
            {"study.overrides": '{"flora": {"train.learning-rate": 0.5}}'},
            "train.learning-rate = 0.5: is set for flora by itself",
        ),
        (
            {"study.settings": '{"a": {"data.validation-fraction": 0.2}}'},
            "data.validation-fraction = 0.2: is set for fedavg-a by itself",
        ),
        ({"study.variants": json.dumps({"v" * 90: {}})}, "the name of a run that tunes, is too long"),
    ],
)  # fmt: skip
def test_what_would_tune_on_what_is_reported_is_refused(
    keys: dict[str, Any], message: str, simulation: Simulation, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        run_study(tuned_study(**keys), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert simulation.ran == []
    assert not (tmp_path / "out").exists()

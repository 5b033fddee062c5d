"""Early stopping and the best round kept: by the rounds' lines alone, and alike after a resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedlora.errors import ConfigError, NotApplicable
from fedlora.server.best import best_round, chosen, has_ended
from fedlora.server.callbacks import KeepBest
from fedlora.server.validate import check
from fedlora.study.analyse.results import load_result
from fedlora.study.plan.cells import expand
from tests.conftest import tiny_config
from tests.federation.test_kinds import run

pytestmark = pytest.mark.slow

NAN = float("nan")
WILD: dict[str, Any] = {"train.learning-rate": 0.5, "train.optimizer": "sgd", "num-server-rounds": 5}
"""Rounds of which the first is not the best, and neither is the last; a test holds that."""
BEST = WILD | {"load-best-model-at-end": True}


def lines(*losses: float | None) -> list[dict[str, Any]]:
    return [
        {"round": n, "loss": loss, "accuracy": None if loss is None else -loss}
        for n, loss in enumerate(losses, 1)
    ]


def record(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / "run" / "result.json").read_text())
    return found


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_the_first_of_the_best_evaluations_counts(metric: str) -> None:
    config = tiny_config(**{"metric-for-best-model": metric})
    assert best_round(config, lines(None, 3.0, NAN, 1.0, None, 1.0, 2.0)) == 4
    assert best_round(config, lines(None, NAN)) == 0


@pytest.mark.parametrize(
    ("losses", "threshold", "ended"),
    [
        ((3.0, 2.0, 2.5), 0.0, False),
        ((3.0, 2.0, 2.5, 2.5), 0.0, True),
        ((3.0, 2.0, None, None, None, 2.5), 0.0, False),  # rounds without an evaluation do not count
        ((3.0, 2.0, 2.5, 1.9, 2.0), 0.0, False),
        ((3.0, 2.9, 2.85), 0.2, True),
        ((3.0, 2.9, 2.7), 0.1, False),
        ((3.0, NAN, NAN), 0.0, True),
        ((2.0, 2.0, 2.0), 0.0, True),
    ],
)
def test_patience_counts_evaluations_without_a_better_one(
    losses: tuple[float | None, ...], threshold: float, ended: bool
) -> None:
    keys = {"early-stopping-patience": 2, "early-stopping-threshold": threshold, "num-server-rounds": 9}
    assert has_ended(tiny_config(**keys), lines(*losses)) is ended


def test_a_result_says_of_which_round_it_is() -> None:
    config = tiny_config(**{"load-best-model-at-end": True})
    assert chosen(config, lines(1.0, 2.0, 3.0)) == {"best_round": 1, "best_on": "test"}
    assert chosen(tiny_config(), lines(1.0, 2.0, 3.0)) == {}


@pytest.mark.parametrize("strategy", ["fedavg", "flora", "fedsvd"])
def test_a_run_ends_with_the_model_of_its_best_round(strategy: str, tmp_path: Path, cache: Path) -> None:
    """The adapter and figures are those of a run of so many rounds; the checkpoint is the last round's."""
    keys = {**BEST, "strategy.name": strategy}
    done = run(tmp_path / "kept", **keys)
    found = record(tmp_path / "kept")
    number = found["best_round"]
    assert 1 < number < 5, [r["loss"] for r in done.directory.rounds()]
    short = run(tmp_path / "short", **keys | {"num-server-rounds": number, "load-best-model-at-end": False})
    for name in done.state.adapters:
        assert torch.equal(done.state.product(name).dense(), short.state.product(name).dense())
    file = Path("run", "adapter", "adapter_model.safetensors")
    assert (tmp_path / "kept" / file).read_bytes() == (tmp_path / "short" / file).read_bytes()
    assert found["loss"] == record(tmp_path / "short")["loss"]
    assert found["rounds"] == 5
    # more rounds go on from the last one, not from the best
    run(tmp_path / "kept", resume=True, **keys | {"num-server-rounds": 6})
    whole = run(tmp_path / "whole", **keys | {"num-server-rounds": 6, "load-best-model-at-end": False})
    assert record(tmp_path / "kept")["rounds"] == 6
    assert json_lines(tmp_path / "kept")[-1]["loss"] == json_lines(tmp_path / "whole")[-1]["loss"]
    assert whole.state.round == 6


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "run" / "rounds.jsonl").read_text().splitlines()]


def test_a_crash_after_a_checkpoint_loses_no_best_round(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", **BEST)
    number = record(tmp_path / "whole")["best_round"]
    real = KeepBest.after_round

    def dies(self: KeepBest, done: Any, report: Any) -> None:
        if report.server_round == number:
            raise KeyboardInterrupt
        real(self, done, report)

    monkeypatch.setattr(KeepBest, "after_round", dies)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", **BEST)
    monkeypatch.setattr(KeepBest, "after_round", real)
    again = run(tmp_path / "cut", resume=True, **BEST)
    assert record(tmp_path / "cut")["best_round"] == number == again.state.round


def test_a_best_model_that_is_gone_is_named(tmp_path: Path, cache: Path) -> None:
    run(tmp_path, **BEST)
    shutil.rmtree(tmp_path / "run" / "best")
    with pytest.raises(ConfigError, match=r"best: has not the model of round \d, the best one; put it back"):
        run(tmp_path, resume=True, **BEST)


def test_a_run_that_goes_back_behind_what_is_kept_is_refused_at_once(tmp_path: Path, cache: Path) -> None:
    keys = BEST | {"save-total-limit": 5}
    run(tmp_path, **keys)
    folder, best = tmp_path / "run" / "checkpoint", tmp_path / "run" / "best"
    number = record(tmp_path)["best_round"]
    shutil.rmtree(best)  # as if the round that is undone had been the best one
    shutil.copytree(folder, best)
    shutil.copy(folder / f"round-0000{number + 1}.json", folder / "latest.json")
    with pytest.raises(ConfigError, match=rf"best: has not the model of round {number}, the best one"):
        run(tmp_path, resume=True, **keys)
    assert len(json_lines(tmp_path)) == number + 1


def test_a_run_ends_early_and_stays_ended(tmp_path: Path, cache: Path) -> None:
    keys = BEST | {"early-stopping-patience": 1, "num-server-rounds": 8}
    run(tmp_path / "stopped", **keys)
    found, rounds = record(tmp_path / "stopped"), json_lines(tmp_path / "stopped")
    assert found["stopped_early"] is True
    assert found["rounds"] == len(rounds) == found["best_round"] + 1 < 8
    run(tmp_path / "stopped", resume=True, **keys)
    assert json_lines(tmp_path / "stopped") == rounds
    patient = {"early-stopping-patience": 0}
    run(tmp_path / "stopped", resume=True, **keys | patient)
    assert len(json_lines(tmp_path / "stopped")) == 8
    assert "stopped_early" not in record(tmp_path / "stopped")


def test_a_study_reads_a_run_that_ended_early(tmp_path: Path, cache: Path) -> None:
    keys = BEST | {"early-stopping-patience": 1, "num-server-rounds": 8, "study.strategies": "fedavg"}
    done = run(tmp_path, **keys)
    (cell,) = expand(done.config, 6)
    assert len(load_result(cell, tmp_path / "run").rounds) < 8


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (
            {"load-best-model-at-end": True, "evaluate-every": 3},
            "load-best-model-at-end = True: must be false without evaluations to choose among, "
            "evaluate-every = 3 makes 1 in 3 rounds",
        ),
        (
            {"early-stopping-patience": 2, "evaluate-every": 2},
            "early-stopping-patience = 2: must be below the number of evaluations, "
            "evaluate-every = 2 makes 2 in 3 rounds",
        ),
    ],
)
def test_what_can_choose_nothing_is_refused(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=f"^{line}$"):
        tiny_config(**keys)


def test_what_clients_keep_has_no_best_round() -> None:
    with pytest.raises(NotApplicable, match=r"^load-best-model-at-end = true: clients keep a part"):
        check(tiny_config(**{"load-best-model-at-end": True, "model.head": "local"}))
    check(tiny_config(**{"early-stopping-patience": 1, "model.head": "local"}))

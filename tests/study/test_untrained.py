"""The model before training is measured once for the runs of a study that begin with the same one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedlora.config import RunConfig, from_flat, to_flat
from fedlora.core.sealed import read_sealed, sealed
from fedlora.server.directory import RunDirectory
from fedlora.server.evaluator import GlobalEvaluator
from fedlora.server.untrained import TAKEN_FROM
from fedlora.simulation.in_process import InProcessEngine
from fedlora.simulation.simulate import simulate_on
from tests.tasks.test_language import jsonl, lm_config

Run = Callable[..., dict[str, Any]]


@pytest.fixture
def config(cache: Path, tmp_path: Path) -> RunConfig:
    rows = [{"text": two * (20 + n), "domain": two} for two in ("ab", "cd") for n in range(20)]
    data = jsonl(tmp_path / "letters.jsonl", rows)
    keys = {"data.name": data, "data.evaluate-examples": 3, "train.local-steps": 1, "num-server-rounds": 1}
    return lm_config(**keys, **{"engine.cohort-size": 1})


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a model was measured whole."""
    calls: list[int] = []
    whole = GlobalEvaluator.whole

    def counted(self: GlobalEvaluator, state: Any) -> Any:
        calls.append(state.round)
        return whole(self, state)

    monkeypatch.setattr(GlobalEvaluator, "whole", counted)
    return calls


@pytest.fixture
def run(config: RunConfig, tmp_path: Path) -> Run:
    """Runs with some keys changed, each in a directory of one study or alone; what is in it."""
    engine = InProcessEngine()

    def carry_out(name: str, *, alone: bool = False, **keys: Any) -> dict[str, Any]:
        path = tmp_path / ("alone" if alone else "study") / name
        changed = from_flat({**to_flat(config), **keys})
        told: list[dict[str, Any]] = []
        simulate_on(
            engine,
            changed,
            RunDirectory(path, shared=None if alone else path.parent),
            "a",
            callback=told.append,
        )
        found = {name: read_sealed(path / name) for name in ("before.json", "samples.json")}
        return {**found, "told": {k: v for k, v in told[0].items() if k != "seconds"}}

    return carry_out


def without_source(found: dict[str, Any]) -> dict[str, Any]:
    return {
        name: {k: v for k, v in record.items() if k not in (TAKEN_FROM, "after")}
        for name, record in found.items()
    }


def test_others_take_the_same_bits_and_say_from_whom(run: Run, measured: list[int]) -> None:
    first = run("first")
    measured.clear()
    second = run("second", **{"strategy.name": "flora", "lora.rank": 2})
    assert 0 not in measured
    assert TAKEN_FROM not in first["before.json"]
    assert second["before.json"][TAKEN_FROM] == second["told"][TAKEN_FROM] == "first"
    alone = run("second", alone=True, **{"strategy.name": "flora", "lora.rank": 2})
    assert without_source(second) == without_source(alone) == without_source(first)


@pytest.mark.parametrize(
    "keys",
    [
        {"data.evaluate-examples": 4},
        {"evaluation-precision": "bfloat16"},
        {"strategy.init-a": "pissa"},
        {"data.max-length": 16},
        {"model.dtype": "bfloat16"},
    ],
    ids=lambda keys: next(reversed(keys)),
)
def test_what_changes_the_figures_is_measured_anew(keys: dict[str, Any], run: Run, tmp_path: Path) -> None:
    run("first")
    other = run("other", **keys)
    assert TAKEN_FROM not in other["before.json"]
    assert len(list((tmp_path / "study").glob("untrained-*.json"))) == 2
    assert other["told"] == run("other", alone=True, **keys)["told"]


@pytest.mark.parametrize("damage", ["a bit", "half a file", "no seal"])
def test_a_damaged_file_is_said_and_replaced(
    damage: str, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = run("first")
    (file,) = (tmp_path / "study").glob("untrained-*.json")
    text = file.read_text()
    whole = json.loads(text)
    file.write_text({
        "a bit": text.replace('"accuracy": 0', '"accuracy": 1', 1),
        "half a file": text[: len(text) // 2],
        "no seal": json.dumps({key: value for key, value in whole.items() if key != "sha256"}),
    }[damage])  # fmt: skip
    second = run("second")
    assert "it is measured again" in caplog.text
    assert TAKEN_FROM not in second["before.json"]
    assert without_source(second) == without_source(first)
    assert read_sealed(file)["by"] == "second"
    assert json.loads(file.read_text()) == sealed(read_sealed(file))

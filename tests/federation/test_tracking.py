"""Trackers: real adapters of accelerate, stand-ins for the packages behind them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from fedlora.config import RunConfig
from fedlora.errors import ConfigError
from fedlora.server import tracking
from fedlora.server.directory import RunDirectory
from fedlora.server.tracking import Tracking, check_tracking, numbers
from fedlora.server.validate import check
from fedlora.simulation.simulate import simulate
from tests.conftest import tiny_config

ROUNDS = [
    {"round": n, "accuracy": 0.5 + n / 10, "strategy": "ffa", "epsilon": None, "private": False,
     "loss": float("nan"), "accuracy_by_domain": {"a": 0.25}, "refused": {"2": "late"}}
    for n in (1, 2)
]  # fmt: skip
RESULT = {"rounds": 2, "accuracy": 0.75, "labels": ["no", "yes"]}


class Run:
    """What the packages' own runs have in common."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def package(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for ``wandb`` or ``trackio``."""
    module: Any = ModuleType(name)
    module.run, module.asked, module.kept = Run(), {}, {}
    module.__spec__ = SimpleNamespace(name=name)

    def init(**keys: Any) -> Run:
        module.asked.update(keys)
        return module.run

    module.init = init
    module.config = SimpleNamespace(update=lambda values, **_: module.kept.update(values))
    monkeypatch.setitem(sys.modules, name, module)
    return module


def tracked(config: RunConfig, path: Path) -> None:
    told = Tracking(config, path)
    for record in ROUNDS:
        told.log_round(record)
    told.log_result(RESULT)
    told.close()


@pytest.mark.parametrize("tool", ["wandb", "trackio"])
def test_rounds_result_and_configuration_arrive(
    tool: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = package(tool, monkeypatch)
    tracked(tiny_config(**{"tracking.tool": tool}), tmp_path / "mine")
    assert (module.asked["project"], module.asked["name"]) == ("fedlora", "mine")
    assert module.kept["lora.rank"] == 4
    assert module.run.logged == [
        (1, {"round": 1, "accuracy": 0.6, "accuracy_by_domain/a": 0.25}),
        (2, {"round": 2, "accuracy": 0.7, "accuracy_by_domain/a": 0.25}),
        (2, {"final/rounds": 2, "final/accuracy": 0.75}),
    ]
    assert module.run.finished


def test_weights_and_biases_stays_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = package("wandb", monkeypatch)
    tracked(tiny_config(**{"tracking.tool": "wandb"}), tmp_path)
    assert (module.asked["mode"], module.asked["dir"]) == ("offline", str(tmp_path))


def test_tensorboard_writes_events_that_can_be_read(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs the package tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracked(tiny_config(**{"tracking.tool": "tensorboard"}), tmp_path)
    events = EventAccumulator(str(tmp_path / "tracking")).Reload()
    assert [(e.step, round(e.value, 6)) for e in events.Scalars("accuracy")] == [(1, 0.6), (2, 0.7)]
    assert [e.value for e in events.Scalars("final/accuracy")] == [0.75]


def test_mlflow_writes_into_the_run(tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="needs the package mlflow")
    tracked(tiny_config(**{"tracking.tool": "mlflow"}), tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'tracking' / 'mlflow.db'}")
    (run,) = mlflow.search_runs(experiment_names=["fedlora"], output_format="list")
    assert run.data.metrics["final/accuracy"] == 0.75
    assert run.data.params["lora.rank"] == "4"


def test_a_whole_run_is_tracked_from_the_place_that_writes_its_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path
) -> None:
    module, path = package("wandb", monkeypatch), tmp_path / "run"
    simulate(tiny_config(**{"tracking.tool": "wandb"}), path)
    *rounds, final = module.run.logged
    records = RunDirectory(path, resume=True).rounds()
    assert rounds == [(record["round"], numbers(record)) for record in records]
    assert final[1]["final/accuracy"] == json.loads((path / "result.json").read_text())["accuracy"]
    assert module.run.finished


@pytest.mark.parametrize("moment", ["init", "log"])
def test_a_tracker_that_breaks_ends_the_tracking_only(
    moment: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = package("wandb", monkeypatch)

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left\non device")

    monkeypatch.setattr(module if moment == "init" else module.run, moment, full)
    tracked(tiny_config(**{"tracking.tool": "wandb"}), tmp_path)
    told = capsys.readouterr().err.strip().splitlines()
    assert told == ["warning: tracking stopped (OSError: no space left); the run goes on"]


def test_off_by_default_and_nothing_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tracking, "tracker_of", lambda *_: pytest.fail("a tracker was asked for"))
    tracked(tiny_config(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"tracking.tool = 'wandb': the package wandb is not installed here"
    ):
        check(tiny_config(**{"tracking.tool": "wandb"}))
    check_tracking("none")


@pytest.mark.parametrize("name", ["TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"])
def test_trackio_is_not_sent_elsewhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package("trackio", monkeypatch)
    check_tracking("trackio")
    monkeypatch.setenv(name, "somebody/else")
    with pytest.raises(ConfigError, match=f"tracking.tool = 'trackio': {name} is set"):
        check_tracking("trackio")


def test_another_tool_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tracking.tool = 'excel': accepted are none, tensorboard"):
        tiny_config(**{"tracking.tool": "excel"})

"""Several cells at a time: the same results, in order, and nothing left behind."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from fedlora.config import EngineConfig, RunConfig, from_flat, read_config
from fedlora.errors import ConfigError, RunFailed
from fedlora.study.execute import parallel, scheduler
from fedlora.study.execute.cell import Engine, run_cell
from fedlora.study.execute.parallel import DIED, CellProcess, run_beside, shares
from fedlora.study.execute.runner import run_study
from tests.study import light
from tests.study.simulation import Simulation, study

PATIENCE = 60.0


def cells(*labels: str) -> Any:
    return [SimpleNamespace(label=label) for label in labels]


class Fake:
    """A runner that waits for the one beside it before it has done its first cell."""

    def __init__(self, ran: list[str], together: threading.Barrier | None = None) -> None:
        self.ran, self.together, self.closed = ran, together, threading.Event()

    def run(self, cell: Any, home: Path, title: str) -> str | None:
        self.ran.append(title)
        if self.together is not None:
            self.together.wait(PATIENCE)
            self.together = None
        return "too few clients" if cell.label == "bad" else None

    def close(self) -> None:
        self.closed.set()


def test_cells_run_together_in_order_and_each_once(tmp_path: Path) -> None:
    ran: list[str] = []
    together = threading.Barrier(2)
    labels = ["a", "b", "bad", "c", "d"]
    runners = [Fake(ran, together), Fake(ran, together)]
    failed = run_beside(runners, cells(*labels), tmp_path, {label: label.upper() for label in labels})
    assert failed == {"bad": "too few clients"}
    assert sorted(ran[:2]) == ["A", "B"], "the barrier was passed, so both ran at once"
    assert sorted(ran) == ["A", "B", "BAD", "C", "D"]


def test_an_interruption_stops_every_runner(tmp_path: Path) -> None:
    class Interrupted(Fake):
        def run(self, cell: Any, home: Path, title: str) -> str | None:
            raise KeyboardInterrupt

    class Busy(Fake):
        def run(self, cell: Any, home: Path, title: str) -> str | None:
            self.ran.append(title)
            assert self.closed.wait(PATIENCE), "nobody stopped it"
            return None

    ran: list[str] = []
    runners = [Interrupted(ran), Busy(ran)]
    with pytest.raises(KeyboardInterrupt):
        run_beside(runners, cells("a", "b", "c"), tmp_path, {"a": "a", "b": "b", "c": "c"})
    assert len(ran) <= 1
    assert all(runner.closed.is_set() for runner in runners)


# --- one process -------------------------------------------------------------------------------------


@pytest.fixture
def process(monkeypatch: pytest.MonkeyPatch) -> Iterator[CellProcess]:
    monkeypatch.setattr(parallel, "serve", light.serve)
    process = CellProcess(from_flat({}), "nowhere")
    yield process
    process.close()


def pid(home: Path) -> int:
    return int((home / "pid").read_text())


def test_a_process_that_dies_has_failed_its_cell(process: CellProcess, tmp_path: Path) -> None:
    (cell,) = cells("a")
    assert process.run(cell, tmp_path / "a", "run") is None
    assert process.run(cell, tmp_path / "b", "too few clients") == "too few clients"
    assert process.run(cell, tmp_path / "c", "die") == DIED
    assert json.loads((tmp_path / "c" / "failed.json").read_text()) == {"reason": DIED}
    assert process.run(cell, tmp_path / "d", "run") is None
    assert pid(tmp_path / "a") == pid(tmp_path / "b") == pid(tmp_path / "c") != pid(tmp_path / "d")


def test_closing_ends_a_process_in_the_middle_and_records_no_failure(
    process: CellProcess, tmp_path: Path
) -> None:
    (cell,) = cells("a")
    reasons: list[str | None] = []
    thread = threading.Thread(target=lambda: reasons.append(process.run(cell, tmp_path / "a", "sleep")))
    thread.start()
    while not (tmp_path / "a" / "pid").exists() or not (tmp_path / "a" / "pid").read_text():
        thread.join(0.05)
    process.close()
    thread.join(PATIENCE)
    assert reasons == [None]
    assert not psutil.pid_exists(pid(tmp_path / "a"))
    assert not (tmp_path / "a" / "failed.json").exists()


# --- in a study --------------------------------------------------------------------------------------


@pytest.fixture
def divided(simulation: Simulation, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How the actors were divided, each time; cells run on the simulation."""
    asked: list[list[int]] = []

    @contextmanager
    def processes(config: RunConfig, places: int, parallel: int) -> Iterator[list[Any]]:
        asked.append(shares(places, parallel))
        engine = Engine(config)
        once = SimpleNamespace(run=lambda *order: run_cell(engine, *order), close=engine.close)
        yield [once]

    monkeypatch.setattr(scheduler, "processes", processes)
    return asked


def test_what_is_waiting_runs_beside_each_other_and_twins_wait(
    divided: list[list[int]], simulation: Simulation, tmp_path: Path
) -> None:
    simulation.inputs = lambda config: "weights"
    run_study(study(strategies="fedavg"), tmp_path / "out")
    simulation.fails["flora"] = RunFailed("too few clients")
    twin = '{"twin": {"strategy.name": "ffa"}}'
    config = study(strategies="fedavg,flora,ffa", variants=twin)
    with pytest.raises(RunFailed, match="1 of 4 runs failed"):
        run_study(config, tmp_path / "out", resume=True, parallel=3)
    assert simulation.ran == ["fedavg", "flora", "ffa"], "the twin of ffa was taken from it"
    assert simulation.titles[1:] == ["[2/4] flora", "[3/4] ffa"]
    assert divided == [[2, 2]], "two cells are left, which divide four actors"


def test_more_cells_than_actors_are_refused(
    divided: list[list[int]], simulation: Simulation, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"--parallel 5: each cell needs an actor of its own, .* are 4"):
        run_study(study(strategies="fedavg,flora"), tmp_path / "out", parallel=5)
    assert simulation.ran == []
    assert not (tmp_path / "out").exists()


TINY = {
    "num-server-rounds": 2, "seed": 1, "model.name": "tiny", "data.name": "synthetic", "lora.rank": 4,
    "lora.ranks": "2,4", "data.evaluate-examples": 60, "train.local-steps": 3, "engine.num-actors": 2,
    "engine.num-cpus": 0.5, "study.strategies": "flora,head-only",
}  # fmt: skip
ONE = {"engine.name": "in-process"}
MEASURED_ANEW = ("seconds", "peak_memory_bytes", "files_sha256", "sha256")


def outcome(cell: Path) -> Any:
    """What it left, but for what is measured anew and the engine that it ran on."""
    lines = [json.loads(line) for line in (cell / "rounds.jsonl").read_text().splitlines()]
    records = [*lines, json.loads((cell / "result.json").read_text())]
    kept = [{k: v for k, v in record.items() if k not in MEASURED_ANEW} for record in records]
    adapter = (cell / "adapter" / "adapter_model.safetensors").read_bytes()
    identity = json.loads((cell / "provenance.json").read_text())["identity"]
    return replace(read_config(cell / "config.toml"), engine=EngineConfig()), kept, adapter, identity


def engines() -> set[int]:
    """Processes that run cells, actors, and Rays below this one."""
    alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    words = ("spawn_main", "ray::ClientActor", "gcs_server", "/raylet ")
    return {p.pid for p in alive if any(word in " ".join(p.cmdline()) for word in words)}


@pytest.mark.slow
def test_two_at_a_time_give_the_bits_of_one_after_the_other(
    cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config, before = from_flat(TINY), engines()
    run_study(from_flat({**TINY, **ONE}), tmp_path / "a" / "out")
    capfd.readouterr()
    run_study(config, tmp_path / "b" / "out", parallel=2)
    said = capfd.readouterr().err
    labels = sorted(path.parent.name for path in (tmp_path / "a" / "out").glob("*/result.json"))
    assert len(labels) == 2
    for label in labels:
        assert outcome(tmp_path / "a" / "out" / label) == outcome(tmp_path / "b" / "out" / label), label
        assert f"{label}: round 2/2" in said
    until = time.monotonic() + PATIENCE
    while engines() - before and time.monotonic() < until:  # a Ray that was there ends its actors by and by
        time.sleep(0.2)
    assert not engines() - before
